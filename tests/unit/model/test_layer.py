"""The last layer goes on with the rows that something reads, and nobody can tell by its results."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from megatron_cocoa.batch import MaskKind
from megatron_cocoa.config import AdapterSettings, ModelSettings, ParallelSettings, RecomputeSettings, TrainSettings
from megatron_cocoa.model.build import build_model, row_multiple
from megatron_cocoa.model.heads import padded_rows
from megatron_cocoa.model.specs import repeats_whole_mlps
from tests.parity import reference

SAMPLES = [reference.Sample((5,)), reference.Sample((2, (1, 4, 6), 3)), reference.Sample((11,))]


def pack(tiny, kind=MaskKind.BIDIRECTIONAL, **more):
    return tiny.pack(tiny.encode(SAMPLES, kind), kind, **more)


def rows_of_mlps(block, monkeypatch) -> list[int]:
    """Filled, at each forward pass, with the rows that each layer's MLP sees."""
    seen = []
    for layer in block.layers:
        forward = layer.mlp.forward
        monkeypatch.setattr(
            layer.mlp, "forward", lambda x, *args, f=forward, **kw: seen.append(x.shape[0]) or f(x, *args, **kw)
        )
    return seen


def test_the_last_mlp_sees_what_is_read(tiny_with_decoder, monkeypatch):
    """Claim: supervised rows and embeddings, masked units in the image decoder, all where the decoder needs them."""
    chunk, batch = tiny_with_decoder.chunk, pack(tiny_with_decoder, with_units=True)
    language = rows_of_mlps(chunk.language_model.decoder, monkeypatch)
    decoder = rows_of_mlps(chunk.image_decoder.decoder, monkeypatch)
    tokens, supervised, units = batch.num_tokens, len(batch.text_positions), len(batch.unit_positions)
    chunk(batch)
    assert language == [tokens] * len(language) and decoder == [units] and units < tokens
    for positions, read in (
        (dict(unit_positions=None, unit_targets=None), supervised + 3),
        (dict(unit_positions=None, unit_targets=None, embedding_positions=None), supervised),
        (dict(unit_positions=None, unit_targets=None, text_positions=None, text_labels=None), 3),
    ):
        language.clear()
        chunk(replace(batch, **positions))
        assert language == [tokens] * (len(language) - 1) + [read]


@pytest.mark.parametrize("kind", [MaskKind.BIDIRECTIONAL, MaskKind.EOS_BRIDGED, MaskKind.CAUSAL])
@pytest.mark.parametrize("multiple", [1, 16], ids=["as-read", "padded"])
def test_rows_and_gradients_are_those_of_the_whole_layer(tiny, monkeypatch, kind, multiple):
    """Claim: losses, embeddings and every gradient equal those of the layer run on all rows, padded rows or not."""
    chunk, batch = tiny.chunk, pack(tiny, kind)
    monkeypatch.setattr(chunk, "row_multiple", multiple)
    found = {}
    for whole in (True, False):
        chunk.zero_grad()
        output = chunk(batch, return_hidden_states=whole)
        assert (output.hidden_states is None) != whole
        (output.token_nll.sum() + output.embeddings.square().sum()).backward()
        gradients = {name: p.grad.clone() for name, p in chunk.named_parameters() if p.grad is not None}
        found[whole] = output.token_nll.detach(), output.embeddings.detach(), gradients
    chunk.zero_grad()
    for mine, wanted in zip(found[False][:2], found[True][:2]):
        assert_close(mine, wanted, rtol=1e-5, atol=1e-6)
    assert found[False][2].keys() == found[True][2].keys()
    for name, gradient in found[True][2].items():
        # Products of other shapes sum in another order.
        assert_close(found[False][2][name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_a_pack_of_which_nothing_is_read_runs(tiny):
    """Claim: a rank whose share holds no supervised row still runs its backward pass, with gradients of zero."""
    batch = pack(tiny)
    none = batch.text_positions[:0]
    tiny.chunk.zero_grad()
    output = tiny.chunk(replace(batch, text_positions=none, text_labels=none, embedding_positions=none))
    assert output.token_nll.shape == (0,) and output.embeddings.shape == (0, 64)
    (output.token_nll.sum() + output.embeddings.sum()).backward()
    gradients = {name: p.grad for name, p in tiny.chunk.named_parameters()}
    tiny.chunk.zero_grad()
    # In every layer, or a context-parallel rank would not take part in the exchanges of the backward pass.
    assert all(g is not None and (g == 0).all() for name, g in gradients.items() if ".layers." in name)


@pytest.mark.parametrize(("rows", "multiple", "padded"), [(0, 1, 1), (0, 8, 8), (5, 1, 5), (5, 8, 8), (16, 8, 16)])
def test_rows_are_padded_to_what_layers_need(rows, multiple, padded):
    """Claim: never no row at all, and a multiple of what tensor parallel ranks or FP8 kernels need."""
    found = padded_rows(torch.arange(3, 3 + rows), multiple)
    assert found.shape == (padded,) and torch.equal(found[:rows], torch.arange(3, 3 + rows))
    assert (found[rows:] == 0).all()


def test_the_multiple_follows_from_layout_and_precision():
    """Claim: parts of tensor-parallel ranks under sequence parallelism, blocks of the FP8 recipe, both together."""

    def settings(fp8, sequence_parallel):
        parallel = ParallelSettings(tensor_model_parallel_size=4, sequence_parallel=sequence_parallel)
        return TrainSettings(model=ModelSettings(fp8=fp8), parallel=parallel)

    found = [row_multiple(settings(fp8, sp)) for fp8 in (None, "delayed") for sp in (False, True)]
    assert found == [1, 4, 16, 64]


@pytest.mark.parametrize("is_adapted", [False, True])
def test_the_layers_that_were_asked_for_recompute_their_mlp(tiny, is_adapted):
    """Claim: the first so many of the tower and all of the language model, lean unless adapters change what they do."""
    settings = TrainSettings(
        recompute=RecomputeSettings(vision="mlp", vision_num_layers=2, language="mlp"),
        adapter=AdapterSettings(kind="lora" if is_adapted else "none"),
    )
    (chunk,) = build_model(tiny.chunk.architecture, settings, with_image_decoder=True).bare_chunks
    for block, expected in (
        (chunk.vision_model.decoder, 2),
        (chunk.language_model.decoder, len(chunk.language_model.decoder.layers)),
        (chunk.image_decoder.decoder, 0),
    ):
        lean = [layer.mlp.linear_fc1.remakes_output for layer in block.layers]
        whole = [layer.recompute_mlp for layer in block.layers]
        wanted = [index < expected for index in range(len(block.layers))]
        nothing = [False] * len(wanted)
        assert (lean, whole) == ((nothing, wanted) if is_adapted else (wanted, nothing))
    assert repeats_whole_mlps(settings) is is_adapted, "what is counted is what is built"
