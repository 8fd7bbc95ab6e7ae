"""Heads run where the batch holds positions for them and nowhere else; padding never takes part."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from megatron_cocoa.batch import MaskKind
from tests.parity import reference

SAMPLES = [reference.Sample((5,)), reference.Sample((2, (1, 4, 6), 3))]


def pack(tiny, **more):
    return tiny.pack(tiny.encode(SAMPLES, MaskKind.BIDIRECTIONAL), MaskKind.BIDIRECTIONAL, **more)


def test_without_labels_no_head_runs(tiny_with_decoder, monkeypatch):
    """Claim: an embedding batch never pays for logits or pixels."""
    chunk = tiny_with_decoder.chunk

    def forbidden(*arguments, **keywords):
        raise AssertionError("a head ran without labels")

    monkeypatch.setattr(chunk.language_model.output_layer, "forward", forbidden)
    monkeypatch.setattr(chunk.image_decoder, "forward", forbidden)
    output = chunk(replace(pack(tiny_with_decoder), text_positions=None, text_labels=None))
    assert output.token_nll is None and output.predicted_units is None and output.hidden_states is None
    assert output.embeddings.shape == (2, 64)


def test_logits_are_computed_for_supervised_rows_alone(tiny, monkeypatch):
    """Claim: the token head never sees the whole sequence."""
    batch = pack(tiny)
    seen = []
    forward = tiny.chunk.language_model.output_layer.forward

    def spy(hidden, **keywords):
        seen.append(hidden.shape[0])
        return forward(hidden, **keywords)

    monkeypatch.setattr(tiny.chunk.language_model.output_layer, "forward", spy)
    chosen = torch.tensor([1, 4])
    output = tiny.chunk(
        replace(batch, text_positions=batch.text_positions[chosen], text_labels=batch.text_labels[chosen])
    )
    assert seen == [2] and output.token_nll.shape == (2,)


def test_padded_vocabulary_columns_take_no_part(tiny):
    """Claim: whatever the padding rows of the matrix hold, loss and logits are those of the real tokens."""
    batch = pack(tiny)
    language = tiny.chunk.language_model
    weight = language.shared_embedding_or_output_weight()
    vocabulary = tiny.huggingface.config.text_config.vocab_size
    assert weight.shape[0] == 160 > vocabulary == 157
    with torch.no_grad():
        rows = tiny.hidden_states(batch)[batch.text_positions]
        real = rows @ weight[:vocabulary].T
        wanted = F.cross_entropy(real, batch.text_labels, reduction="none")
        kept = weight[vocabulary:].clone()
        weight[vocabulary:] = 50.0
        found = tiny.chunk(batch).token_nll
        logits = tiny.chunk.full_logits(rows)
        weight[vocabulary:] = kept
    # Float32 sums of 64 products and 157 exponentials.
    assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert_close(logits, real, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor", [None, 2.0])
def test_tied_matrix_gives_its_gradient_as_output_layer_at_once(tiny, factor):
    """Claim: beside DDP's buffer it does not wait for the layers' backward pass, unless a hook has a say in it."""
    language = tiny.chunk.language_model
    weight = language.shared_embedding_or_output_weight()
    of_layers, seen = torch.randn(6, 64, requires_grad=True), []
    of_layers.register_hook(lambda grad: seen.append(weight.main_grad.clone()))
    weight.main_grad = torch.zeros_like(weight)
    hook = None if factor is None else weight.register_hook(lambda grad: factor * grad)
    try:
        hidden = 3 * of_layers
        language.logits(hidden)[:, : language.vocab_size].square().sum().backward()
        waited = weight.grad
    finally:
        del weight.main_grad
        weight.grad = None
        if hook is not None:
            hook.remove()
    with torch.no_grad():
        wanted = 2 * (hidden @ weight.T).T @ hidden
        wanted[language.vocab_size :] = 0
    # Float32 sums of six products of order 100.
    if factor is None:
        assert waited is None
        assert_close(seen[0], wanted, rtol=1e-5, atol=1e-4)
    else:
        assert not seen[0].any()
        assert_close(waited, factor * wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("multiple", [1, 2])
def test_image_decoder_reads_masked_rows_alone(tiny_with_decoder, monkeypatch, multiple):
    """Claim: one row of pixels for each masked unit, in the batch's order, with its targets beside it; rows that only
    make the layers' number even are dropped."""
    monkeypatch.setattr(tiny_with_decoder.chunk.image_decoder, "row_multiple", multiple)
    batch = pack(tiny_with_decoder, with_units=True)
    output = tiny_with_decoder.chunk(batch)
    assert output.predicted_units.shape == batch.unit_targets.shape == (3, 4 * 3 * 2 * 7 * 7)
    assert output.unit_targets is batch.unit_targets
    backwards = replace(
        batch, unit_positions=batch.unit_positions.flip(0), unit_targets=batch.unit_targets.flip(0)
    )
    assert_close(tiny_with_decoder.chunk(backwards).predicted_units, output.predicted_units.flip(0))


@pytest.mark.parametrize("part", ["vision", "merger", "language"])
def test_frozen_parts_are_those_that_the_settings_name(single_rank, part):
    """Claim: freezing a part freezes all of it and nothing else; the image decoder always trains."""
    from megatron_cocoa.architecture import QwenVLArchitecture
    from megatron_cocoa.model.build import build_model
    from tests.parity.cases import Case
    from tests.parity.compare import parameters, settings_of

    settings = settings_of(Case("unit", freeze={part: True}))
    architecture = QwenVLArchitecture.from_huggingface(reference.tiny_config("qwen2_5_vl"))
    prefixes = {
        "vision": ("vision_model.patch_embed.", "vision_model.decoder.layers."),
        "merger": ("vision_model.decoder.final_layernorm.", "vision_model.projection."),
        "language": ("language_model.",),
    }
    model = build_model(architecture, settings, with_image_decoder=True)
    names = dict(parameters(model))
    assert all(any(name.startswith(prefix) for name in names) for prefix in prefixes[part])
    for name, parameter in names.items():
        assert parameter.requires_grad != name.startswith(prefixes[part]), name
