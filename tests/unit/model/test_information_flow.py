"""What a hidden state may depend on: perturb an input and see which rows move."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from megatron_cocoa.batch import MaskKind
from tests.parity import reference

BRIDGED = [MaskKind.EOS_BRIDGED, MaskKind.EOS_BRIDGED_STRICT]
# Rows that cannot be reached keep every operand; their sums may only be ordered differently.
UNMOVED = 1e-6
MOVED = 1e-3


def bridged_batch(tiny, kind):
    """Block A with text and a picture, the bridge, block B of text; the row of the bridge."""
    samples = tiny.encode([reference.Sample((4, (1, 4, 6), 9))], kind)
    bridge = 4 + 1 + 6 + 1 + 3
    samples = [replace(samples[0], bridge=bridge)]
    return tiny.pack(samples, kind), bridge


def with_other_block_a(batch, bridge):
    """Other words and other pixels in block A; the bridge and block B as they were."""
    ids = batch.input_ids.clone()
    text = torch.ones_like(ids, dtype=torch.bool)
    text[batch.feature_positions] = False
    text[bridge:] = False
    ids[text] = (ids[text] + 11) % reference.TEXT_IDS
    return replace(batch, input_ids=ids, pixel_values=batch.pixel_values + 1.0)


@contextmanager
def at_every_layer(tiny, act):
    """Let ``act(index, hidden_states)`` replace the input of each layer of the language model."""

    def hook_of(index):
        def hook(module, arguments, keywords):
            return arguments, keywords | {"hidden_states": act(index, keywords["hidden_states"])}

        return hook

    layers = tiny.chunk.language_model.decoder.layers
    handles = [layer.register_forward_pre_hook(hook_of(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind", BRIDGED)
def test_no_path_from_a_to_b_but_through_the_bridge(tiny, kind):
    """Claim: with the bridge's row held at each layer, nothing in block A moves block B; let go, it does."""
    batch, bridge = bridged_batch(tiny, kind)
    kept = {}

    def keep(index, hidden):
        kept[index] = hidden[bridge].clone()
        return hidden

    def hold(index, hidden):
        hidden = hidden.clone()
        hidden[bridge] = kept[index]
        return hidden

    with at_every_layer(tiny, keep):
        before = tiny.hidden_states(batch)
    assert len(kept) == 4
    other = with_other_block_a(batch, bridge)
    with at_every_layer(tiny, hold):
        held = tiny.hidden_states(other)
    free = tiny.hidden_states(other)
    moved = lambda states: (states - before)[bridge + 1 :].abs().max()  # noqa: E731
    assert (held - before)[:bridge].abs().max() > MOVED
    assert moved(held) < UNMOVED
    assert moved(free) > MOVED


@pytest.mark.parametrize("kind, leaks", [(MaskKind.EOS_BRIDGED, True), (MaskKind.EOS_BRIDGED_STRICT, False)])
def test_the_strict_bridge_does_not_see_its_target(tiny, kind, leaks):
    """Claim: under the strict kind block B changes neither the bridge nor block A; as published it changes both."""
    batch, bridge = bridged_batch(tiny, kind)
    ids = batch.input_ids.clone()
    ids[bridge + 1 :] = (ids[bridge + 1 :] + 5) % reference.TEXT_IDS
    moved = (tiny.hidden_states(replace(batch, input_ids=ids)) - tiny.hidden_states(batch)).abs().amax(dim=1)
    assert moved[bridge + 1 :].min() > MOVED
    assert (moved[bridge] > MOVED) == leaks
    assert (moved[:bridge].max() > MOVED) == leaks
    if not leaks:
        assert moved[: bridge + 1].max() < UNMOVED


def test_the_strict_bridge_is_the_bridge_of_inference(tiny):
    """Claim: the embedding trained under the strict kind is the one that A alone gives at inference."""
    batch, bridge = bridged_batch(tiny, MaskKind.EOS_BRIDGED_STRICT)
    alone = replace(
        batch,
        input_ids=batch.input_ids[: bridge + 1],
        position_ids=batch.position_ids[:, : bridge + 1],
        sample_lengths=(bridge + 1,),
        mask_kind=MaskKind.BIDIRECTIONAL,
        text_positions=None,
        text_labels=None,
    )
    difference = tiny.hidden_states(alone)[bridge] - tiny.hidden_states(batch)[bridge]
    # Other shapes of the same sums: float32 rounding through four layers.
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("kind, sees_later", [(MaskKind.BIDIRECTIONAL, True), (MaskKind.CAUSAL, False)])
def test_a_late_token_changes_an_early_state_only_where_attention_is_bidirectional(tiny, kind, sees_later):
    """Claim: bidirectional means bidirectional: stage 3 embeds with states that have seen the whole sample."""
    batch = tiny.pack(tiny.encode([reference.Sample((12,))], kind), kind)
    ids = batch.input_ids.clone()
    ids[-1] = (ids[-1] + 1) % reference.TEXT_IDS
    moved = (tiny.hidden_states(replace(batch, input_ids=ids)) - tiny.hidden_states(batch)).abs().amax(dim=1)
    assert (moved[0] > MOVED) == sees_later
    assert sees_later or moved[:-1].max() < UNMOVED


@pytest.mark.parametrize("kind", MaskKind)
def test_packed_equals_one_by_one(tiny, kind):
    """Claim: a sample's hidden states depend neither on its neighbours, nor on the batch size, nor on their order."""
    samples = tiny.encode(reference.SAMPLES["mixed"], kind)
    alone = [tiny.hidden_states(tiny.pack([sample], kind)) for sample in samples]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3, 1], [1, 1, 4]):
        packed = tiny.hidden_states(tiny.pack([samples[i] for i in order], kind, multiple=8))
        start = 0
        for i in order:
            found = packed[start : start + len(alone[i])]
            # Relative to the largest entry: matrix products of other shapes round differently.
            assert (found - alone[i]).abs().max() / alone[i].abs().max() < 1e-5
            start += len(alone[i])


def test_the_tail_is_seen_by_nobody(tiny):
    """Claim: what fills a pack to a divisible length changes no sample."""
    kind = MaskKind.BIDIRECTIONAL
    samples = tiny.encode([reference.Sample((5,)), reference.Sample(((1, 4, 4), 2))], kind)
    batch = tiny.pack(samples, kind, multiple=16)
    assert batch.tail_length
    ids = batch.input_ids.clone()
    ids[-batch.tail_length :] = 77
    inside = slice(0, sum(batch.sample_lengths))
    found, wanted = tiny.hidden_states(replace(batch, input_ids=ids)), tiny.hidden_states(batch)
    assert torch.equal(found[inside], wanted[inside])


def test_a_batch_without_pictures_still_reaches_the_tower(tiny):
    """Claim: every parameter of the tower gets a gradient, of zeros, where no sample has a picture: data-parallel
    reduction waits for each of them."""
    batch = tiny.pack(tiny.encode([reference.Sample((6,))], MaskKind.CAUSAL), MaskKind.CAUSAL)
    tiny.chunk.zero_grad(set_to_none=True)
    tiny.chunk(batch).token_nll.sum().backward()
    gradients = {name: p.grad for name, p in tiny.chunk.vision_model.named_parameters()}
    tiny.chunk.zero_grad(set_to_none=True)
    assert gradients and all(grad is not None and not grad.any() for grad in gradients.values())
