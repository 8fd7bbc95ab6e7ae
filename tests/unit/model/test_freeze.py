"""Frozen parts do not train; the mask token's row always does."""

from dataclasses import replace

import torch
from torch.testing import assert_close

from megatron_cocoa.batch import MaskKind
from megatron_cocoa.config import FreezeSettings
from megatron_cocoa.model.build import build_model, freeze_pretrained
from tests.parity import compare, reference
from tests.parity.cases import Case

MASK_TOKEN = 155
SAMPLES = [reference.Sample((7,)), reference.Sample((2, (1, 4, 6), 3))]


def masked_batch(tiny):
    batch = tiny.pack(tiny.encode(SAMPLES, MaskKind.BIDIRECTIONAL), MaskKind.BIDIRECTIONAL)
    ids = batch.input_ids.clone()
    ids[2] = MASK_TOKEN
    return replace(batch, input_ids=ids)


def gradients(chunk, batch) -> dict[str, torch.Tensor]:
    chunk.zero_grad(set_to_none=True)
    output = chunk(batch)
    (output.token_nll.sum() + output.embeddings.sum()).backward()
    return {name: p.grad for name, p in chunk.named_parameters() if p.grad is not None}


def test_a_frozen_language_model_still_trains_the_mask_tokens_row(tiny):
    """Claim: that row gets the gradient of the unfrozen model, every other row exactly zero, other weights none."""
    batch = masked_batch(tiny)
    free = gradients(tiny.chunk, batch)
    settings = replace(compare.settings_of(Case("unit")), freeze=FreezeSettings(language=True))
    model = build_model(tiny.chunk.architecture, settings, with_image_decoder=False, mask_token_id=MASK_TOKEN)
    model.chunks[0].load_state_dict(tiny.chunk.state_dict())
    found = gradients(model.chunks[0], batch)
    name = "language_model.embedding.word_embeddings.weight"
    assert [n for n in found if n.startswith("language_model")] == [name]
    assert_close(found[name][MASK_TOKEN], free[name][MASK_TOKEN])
    others = torch.arange(len(found[name])) != MASK_TOKEN
    assert not found[name][others].any()
    # The tower's gradients pass through the frozen layers unchanged.
    vision = [n for n in free if n.startswith("vision_model")]
    assert vision and all(n in found for n in vision)
    for n in vision:
        assert_close(found[n], free[n])


def test_an_unfrozen_language_model_trains_every_row(tiny):
    """Claim: naming the mask token, as every run does, holds no row back where the language model trains."""
    batch = masked_batch(tiny)
    settings = compare.settings_of(Case("unit"))
    model = build_model(tiny.chunk.architecture, settings, with_image_decoder=False, mask_token_id=MASK_TOKEN)
    model.chunks[0].load_state_dict(tiny.chunk.state_dict())
    free, found = gradients(tiny.chunk, batch), gradients(model.chunks[0], batch)
    assert found.keys() == free.keys()
    assert all(torch.equal(found[name], free[name]) for name in free)


def test_tower_and_merger_freeze_apart(tiny):
    """Claim: each switch stops its own parameters and no others."""
    parts = {"vision": ("patch_embed", "decoder.layers"), "merger": ("final_layernorm", "projection")}
    for switch, frozen in parts.items():
        settings = replace(compare.settings_of(Case("unit")), freeze=FreezeSettings(**{switch: True}))
        model = build_model(tiny.chunk.architecture, settings, with_image_decoder=False)
        for name, parameter in model.chunks[0].named_parameters():
            inside = name.startswith("vision_model.") and any(part in name for part in frozen)
            if switch == "vision" and "final_layernorm" in name:
                inside = False
            assert parameter.requires_grad is not inside, (switch, name)


def test_pretrained_weights_that_freeze_wait_for_no_optimizer(tiny):
    """Claim: beside adapters, weights in FP8 give back the copies that their master weights would have started from."""
    model = build_model(tiny.chunk.architecture, compare.settings_of(Case("unit")), with_image_decoder=False)
    weight = model.chunks[0].language_model.decoder.layers[0].mlp.linear_fc1.weight
    weight.get_high_precision_init_val = weight.clear_high_precision_init_val = lambda: None
    freeze_pretrained(model.chunks[0], MASK_TOKEN)
    assert not weight.requires_grad and not hasattr(weight, "get_high_precision_init_val")
