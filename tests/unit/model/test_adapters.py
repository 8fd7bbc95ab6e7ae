"""LoRA and DoRA on Megatron's fused projections equal peft's on Hugging Face's separate ones."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from megatron_cocoa.batch import MaskKind
from megatron_cocoa.checkpoint.adapter_weights import num_parameters
from megatron_cocoa.checkpoint.live import global_name
from megatron_cocoa.checkpoint.mapping import flat_spelling
from megatron_cocoa.config import VISION_TARGETS, AdapterSettings, FreezeSettings, RecomputeSettings
from megatron_cocoa.model import linear_adapter
from megatron_cocoa.model.adapter_targets import check_targets
from megatron_cocoa.model.adapters import adapted_projections, attach_adapters, merge_adapters, merged_adapters
from megatron_cocoa.parallel.random_states import seed_everything
from tests.parity import adapters
from tests.parity.compare import relative

EVERYWHERE = dict(rank=4, alpha=6.0, dropout=0.0, vision_targets=VISION_TARGETS)
MLPS = dict(rank=4, alpha=6.0, dropout=0.0, language_targets=("down_proj",), vision_targets=("fc2", "down_proj"))
SOME = dict(rank=3, language_targets=("q_proj", "v_proj", "up_proj"), vision_targets=("qkv", "fc1", "gate_proj"))
OUTPUT, GRADIENT = 2e-5, 1e-4
"""Largest relative differences. peft's own float32 is 4e-6 (outputs) and 3e-5 (gradients) away from its float64 with
these adapters, and ours 6e-6 and 5e-5; a wrong part, scale or mask would show at 1e-1."""


def compare_with_peft(case) -> None:
    wanted, found = adapters.run_peft(case), adapters.run_ours(case)
    assert relative(found, wanted) < OUTPUT
    theirs = {name: p.grad for name, p in adapters.peft_parameters(case.peft).items()}
    ours = adapters.our_parts(case, lambda parameter: parameter.grad)
    assert theirs.keys() == ours.keys() and ours
    errors = {name: relative(ours[name], gradient) for name, gradient in theirs.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] < GRADIENT, (worst, errors[worst])
    assert all(bool(gradient.any()) for gradient in theirs.values()), "a gradient of zero compares nothing"


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_outputs_and_gradients_equal_pefts(tiny, kind):
    """Claim: hidden states and the gradient of every A, B and magnitude are peft's, on every target."""
    compare_with_peft(adapters.adapted(tiny, AdapterSettings(kind=kind, **EVERYWHERE)))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_some_targets_of_a_fused_projection(tiny, kind):
    """Claim: q and v can have adapters without k, up without gate; rsLoRA's scale is peft's."""
    case = adapters.adapted(tiny, AdapterSettings(kind=kind, dropout=0.0, alpha=5.0, rslora=True, **SOME))
    compare_with_peft(case)
    fused = case.chunk.language_model.decoder.layers[0].self_attention.linear_qkv_adapter
    assert not fused.lora_B.grad[~fused.has_owner].any(), "rows of k must not train"


def test_a_padded_tower(tiny):
    """Claim: zero padding of the tower's ffn stays out of the adapters, also of DoRA's lengths."""
    case = adapters.adapted(tiny, AdapterSettings(kind="dora", **EVERYWHERE), vision_ffn_multiple=48)
    assert case.chunk.vision_model.decoder.layers[0].mlp.linear_fc2.weight.shape[1] % 48 == 0
    compare_with_peft(case)


class EveryThird(nn.Module):
    """A dropout of p = 1/3 whose mask depends on the feature alone, so that two libraries can draw the same."""

    def forward(self, x):
        return x * (torch.arange(x.shape[-1]) % 3 > 0) * 1.5


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_enters_where_pefts_does(tiny, kind, monkeypatch):
    """Claim: under one mask, training outputs and gradients are peft's; DoRA's rescaled part sees the dropped input."""
    case = adapters.adapted(tiny, AdapterSettings(kind=kind, **EVERYWHERE | {"dropout": 1 / 3}))
    monkeypatch.setattr(linear_adapter, "dropout", lambda x, p, is_sharded: EveryThird()(x))
    for module in case.peft.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = EveryThird()
    case.peft.train()
    compare_with_peft(case)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_weights_are_pefts_and_do_the_same(tiny, kind):
    """Claim: merging gives the weights that peft's merging gives, under the plain names, and the same outputs.

    One fp32 sum and product per weight on both sides: 1e-6 of the largest. Outputs as above.
    """
    case = adapters.adapted(tiny, AdapterSettings(kind=kind, **EVERYWHERE))
    unmerged = adapters.run_ours(case)
    merge_adapters(case.model)
    assert case.chunk.state_dict().keys() == tiny.chunk.state_dict().keys()
    assert not any(module._forward_hooks for module in case.chunk.modules())
    assert relative(tiny_hidden(case), unmerged) < OUTPUT
    theirs = {flat_spelling(name): p for name, p in case.peft.merge_and_unload(safe_merge=True).named_parameters()}
    for name, parameter in case.chunk.named_parameters():
        mapping = case.table.megatron_to_hf(global_name(case.chunk, name))
        wanted = mapping.merge([theirs[hf].detach() for hf in mapping.hf_names])
        assert relative(parameter.detach(), wanted) < 1e-6, name


def test_weights_in_bf16_are_merged_in_fp32(tiny):
    """Claim: a merged weight is rounded once; FP32 or FP64 before that turns one in a thousand elsewhere."""
    settings = adapters.adapter_settings(AdapterSettings(kind="lora", dropout=0.0))
    model = adapters.bare_model(tiny, replace(settings, model=replace(settings.model, dtype="bf16")))
    attach_adapters(model, settings, mask_token_id=None)
    for parent, name, adapter in adapted_projections(model):
        torch.nn.init.normal_(adapter.lora_A)
        torch.nn.init.normal_(adapter.lora_B)
        weight = getattr(parent, name).weight.detach()
        update = adapter.scaling * (adapter._rows_of_b().double() @ adapter.lora_A.double())
        wanted = (weight.double() + update).bfloat16()
        assert (adapter.merged(weight) != wanted).double().mean() < 1e-3, name


def test_weights_are_merged_for_a_while(tiny):
    """Claim: inside of the block the model is the plain one with merged weights, afterwards bit for bit what it was."""
    case = adapters.adapted(tiny, AdapterSettings(kind="dora", **EVERYWHERE))
    before, state = tiny_hidden(case), {name: t.clone() for name, t in case.chunk.state_dict().items() if t is not None}
    with merged_adapters(case.model):
        assert case.chunk.state_dict().keys() == tiny.chunk.state_dict().keys()
        assert relative(tiny_hidden(case), before) < OUTPUT
    assert torch.equal(tiny_hidden(case), before)
    assert all(torch.equal(case.chunk.state_dict()[name], value) for name, value in state.items())


def tiny_hidden(case) -> torch.Tensor:
    with torch.no_grad():
        return case.chunk(case.batch, return_hidden_states=True).hidden_states


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_fresh_adapters_change_nothing(tiny, kind, dtype):
    """Claim: with B at zero the outputs are those of the weights alone, bit for bit, in BF16 too."""
    settings = adapters.adapter_settings(AdapterSettings(kind=kind, dropout=0.0))
    settings = replace(settings, model=replace(settings.model, dtype=dtype))
    model = adapters.bare_model(tiny, settings)
    batch = tiny.pack(tiny.encode(adapters.SAMPLES, MaskKind.CAUSAL), MaskKind.CAUSAL)
    with torch.no_grad():
        before = model.bare_chunks[0](batch, return_hidden_states=True).hidden_states
        attach_adapters(model, settings, mask_token_id=None)
        for name, parameter in model.bare_chunks[0].named_parameters():
            if name.endswith("lora_A"):
                parameter.normal_()
            assert parameter.dtype is torch.float32 or "magnitude" not in name
        assert torch.equal(model.bare_chunks[0](batch, return_hidden_states=True).hidden_states, before)


def test_adapters_the_image_decoder_and_one_row_train(tiny_with_decoder):
    """Claim: nothing else does; peft counts as many adapter values, and the row gets the unfrozen model's gradient."""
    tiny, row = tiny_with_decoder, 155
    adapter = AdapterSettings(kind="dora", **EVERYWHERE)
    settings = replace(adapters.adapter_settings(adapter), freeze=FreezeSettings(merger=False))
    model = adapters.bare_model(tiny, settings, image_decoder=True)
    attach_adapters(model, settings, mask_token_id=row)
    chunk = model.bare_chunks[0]
    trained = {name: p for name, p in chunk.named_parameters() if p.requires_grad}
    ours = {name for name in trained if "_adapter." in name}
    rest = {name for name in trained if not name.startswith("image_decoder.")} - ours
    assert rest == {"language_model.embedding.word_embeddings.weight"}
    assert all(p.requires_grad for p in chunk.image_decoder.parameters())
    case = adapters.adapted(tiny, adapter)
    wanted, _ = case.peft.get_nb_trainable_parameters()
    assert sum(trained[name].numel() for name in ours) == num_parameters(case.mappings) == wanted
    batch = case.batch
    batch.input_ids[2] = row
    chunk(batch).token_nll.sum().backward()
    found = trained["language_model.embedding.word_embeddings.weight"].grad
    tiny.chunk.zero_grad(set_to_none=True)
    tiny.chunk(batch).token_nll.sum().backward()
    free = tiny.chunk.language_model.embedding.word_embeddings.weight.grad
    assert_close(found[row], free[row])
    found[row] = 0
    assert free[row].any() and not found.any()


@pytest.mark.parametrize("mode", ["full", "mlp"])
@pytest.mark.parametrize("targets", [EVERYWHERE, MLPS], ids=["everywhere", "mlps"])
def test_recomputed_layers_train_their_adapters(tiny, mode, targets):
    """Claim: recompute behind a frozen patch embedding and frozen words gives the same gradients."""
    adapter = AdapterSettings(kind="lora", **targets)
    case = adapters.adapted(tiny, adapter)
    adapters.run_ours(case)
    wanted = adapters.our_parts(case, lambda parameter: parameter.grad)
    settings = replace(case.settings, recompute=RecomputeSettings(vision=mode, language=mode))
    again = replace(case, model=adapters.bare_model(tiny, settings), settings=settings)
    attach_adapters(again.model, settings, mask_token_id=None)
    again.chunk.load_state_dict(case.chunk.state_dict())
    adapters.run_ours(again)
    found = adapters.our_parts(again, lambda parameter: parameter.grad)
    for name, gradient in wanted.items():
        # The same operations in the same order.
        assert_close(found[name], gradient, rtol=0, atol=0, msg=name)


def test_dropout_is_redrawn_in_training_only(tiny):
    """Claim: two training passes differ, a recomputed layer sees the masks of its forward pass, evaluation has none."""
    adapter = AdapterSettings(kind="dora", **EVERYWHERE | {"dropout": 0.5})
    case = adapters.adapted(tiny, adapter)
    first, second = tiny_hidden(case), tiny_hidden(case)
    assert relative(first, second) > 1e-3
    case.chunk.eval()
    silent = replace(case, peft=case.peft.eval())
    assert relative(tiny_hidden(silent), adapters.run_peft(silent)) < OUTPUT


def test_dropout_is_replayed_by_recompute(tiny):
    """Claim: gradients with dropout are the same with and without recompute from the same random states."""
    adapter = AdapterSettings(kind="dora", **EVERYWHERE | {"dropout": 0.5})
    case = adapters.adapted(tiny, adapter)
    found = {}
    for how in ("none", "full", "mlp"):
        settings = replace(case.settings, recompute=RecomputeSettings(vision=how, language=how))
        again = replace(case, model=adapters.bare_model(tiny, settings), settings=settings)
        attach_adapters(again.model, settings, mask_token_id=None)
        again.chunk.load_state_dict(case.chunk.state_dict())
        seed_everything(5)
        adapters.run_ours(again)
        found[how] = adapters.our_parts(again, lambda parameter: parameter.grad)
    for name, gradient in found["none"].items():
        assert gradient.any(), name
        assert all(torch.equal(found[how][name], gradient) for how in ("full", "mlp")), name


def test_a_tower_without_any_target_is_refused(tiny):
    """Claim: names of the other family alone would adapt nothing, silently; beside the merger's they may stand."""
    other = "gate_proj" if tiny.chunk.architecture.model_type == "qwen2_vl" else "fc1"
    settings = adapters.adapter_settings(AdapterSettings(kind="lora", vision_targets=(other,)))
    with pytest.raises(ValueError, match=f"{other}.* names no module of a {tiny.chunk.architecture.model_type} tower"):
        attach_adapters(adapters.bare_model(tiny, settings), settings, mask_token_id=None)
    check_targets(tiny.chunk.architecture, replace(settings.adapter, vision_targets=(other, "mlp.0")))
