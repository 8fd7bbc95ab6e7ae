"""What FP8 needs, as far as a CPU can tell: settings, configs, refusals, padding, and the libraries' own names."""

import ast
import dataclasses
import inspect
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_cocoa.config import ModelSettings, ParallelSettings, RecomputeSettings, TrainSettings
from megatron_cocoa.model import fp8, sdpa, specs, varlen, varlen_kernels
from megatron_cocoa.model.attention import SequenceContext
from megatron_cocoa.model.fp8 import check_capability, fp8_multiple, pad_rows
from megatron_cocoa.model.layout_checks import check_layout
from megatron_cocoa.model.segments import SegmentTable
from megatron_cocoa.model.specs import build_provider
from megatron_cocoa.model.transformer_configs import build_configs
from megatron_cocoa.parallel import fp8_parameters
from tests.unit.published import published_architecture

RECIPES = ("delayed", "tensorwise", "mxfp8", "blockwise")


def configs(name: str = "Qwen2.5-VL-3B", **model):
    return build_configs(
        published_architecture(name),
        model=ModelSettings(**model),
        parallel=ParallelSettings(),
        recompute=RecomputeSettings(),
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_megatron_builds_a_config_of_every_recipe(recipe):
    """Claim: the recipes' names are Megatron's own; the tower stays out of FP8 unless asked for."""
    built = configs(fp8=recipe)
    assert built.language.fp8 and built.language.fp8_recipe == recipe and not built.language.fp8_param
    assert built.vision.fp8 is None and built.projection.fp8 is None
    has_weights = recipe != "mxfp8"
    both = configs(fp8=recipe, fp8_vision=True, fp8_param=has_weights, vision_ffn_multiple=128)
    assert both.vision.fp8_recipe == both.language.fp8_recipe == recipe
    assert both.vision.fp8_param == both.language.fp8_param == has_weights and both.projection.fp8 is None


def test_settings_that_need_each_other_are_refused_apart():
    """Claim: each message names what is missing."""
    with pytest.raises(ValueError, match="fp8_vision needs a recipe: set model.fp8"):
        ModelSettings(fp8_vision=True)
    with pytest.raises(ValueError, match="fp8_param needs a recipe: set model.fp8"):
        ModelSettings(fp8_param=True)
    with pytest.raises(ValueError, match="fp8_param needs model.dtype bf16, found fp32"):
        ModelSettings(fp8="delayed", fp8_param=True, dtype="fp32")
    model = ModelSettings(fp8="delayed", fp8_param=True)
    with pytest.raises(ValueError, match="set parallel.use_distributed_optimizer to true"):
        TrainSettings(model=model)
    TrainSettings(model=model, parallel=ParallelSettings(use_distributed_optimizer=True))


def test_widths_that_are_no_whole_blocks_are_refused():
    """Claim: the published 3420 fails in FP8 with the number and the remedy, also under tensor parallelism."""
    architecture = published_architecture("Qwen2.5-VL-3B")
    plain = ModelSettings(fp8="delayed", fp8_vision=True)
    with pytest.raises(ValueError, match="ffn width of the tower, 3420, .* by 16 as .*vision_ffn_multiple to 16,"):
        check_layout(architecture, model=plain, parallel=ParallelSettings())
    check_layout(architecture, model=replace(plain, fp8_vision=False), parallel=ParallelSettings())
    padded = replace(plain, vision_ffn_multiple=16)
    check_layout(architecture, model=padded, parallel=ParallelSettings())
    two = ParallelSettings(tensor_model_parallel_size=2)
    check_layout(architecture, model=replace(plain, vision_ffn_multiple=32), parallel=two)
    with pytest.raises(ValueError, match=r"3424, gives each of 4 .* 856, .*vision_ffn_multiple to 64"):
        check_layout(architecture, model=padded, parallel=ParallelSettings(tensor_model_parallel_size=4))
    wider = replace(architecture, vision=replace(architecture.vision, hidden_size=1312))
    check_layout(wider, model=padded, parallel=ParallelSettings())
    with pytest.raises(ValueError, match="hidden_size of the tower, 1312, gives each of 4 .* 328, .* by 16"):
        check_layout(wider, model=padded, parallel=ParallelSettings(tensor_model_parallel_size=4))
    language = ModelSettings(fp8="delayed")
    for changes, message in (
        (dict(hidden_size=2064), "heads x head_dim of the language model, 2064, gives each of 2 .* 1032, .* by 16"),
        (dict(intermediate_size=11024), "intermediate_size of the language model, 11024, gives each of 2 .* 5512"),
    ):
        changed = replace(architecture, text=replace(architecture.text, **changes))
        check_layout(changed, model=language, parallel=ParallelSettings())
        with pytest.raises(ValueError, match=message):
            check_layout(changed, model=language, parallel=two)


def test_a_chip_without_the_recipe_is_refused():
    """Claim: an A100 runs no FP8 and a Hopper no MXFP8; the message says what was found."""
    for recipe in ("delayed", "tensorwise", "blockwise"):
        check_capability(recipe, (9, 0))
    check_capability("mxfp8", (10, 0))
    with pytest.raises(ValueError, match="needs compute capability 8.9 or more, found compute capability 8.0"):
        check_capability("delayed", (8, 0))
    with pytest.raises(ValueError, match="mxfp8 needs compute capability 10.0 or more, .* 9.0: choose delayed or tens"):
        check_capability("mxfp8", (9, 0))
    with pytest.raises(ValueError, match="mxfp8 has no kernels on compute capability 12.0"):
        check_capability("mxfp8", (12, 0))
    with pytest.raises(ValueError, match="found no GPU"):
        check_capability("blockwise", None)


def test_fp8_is_refused_where_it_would_not_run(monkeypatch):
    """Claim: without Transformer Engine no run takes BF16 for FP8, and a chip is asked before a layer is built."""
    settings = ModelSettings(fp8="delayed")
    monkeypatch.setattr(specs.device, "has_gpu", lambda: True)
    monkeypatch.setattr(specs.device, "compute_capability", lambda: (8, 0))
    monkeypatch.setattr(specs.device, "is_installed", lambda name: False)
    with pytest.raises(ValueError, match="fp8 needs Transformer Engine and a GPU that has it; set model.fp8 to null"):
        specs.resolve_implementation(settings)
    monkeypatch.setattr(specs.device, "is_installed", lambda name: True)
    with pytest.raises(ValueError, match="needs compute capability 8.9 or more, found compute capability 8.0"):
        specs.resolve_implementation(settings)
    monkeypatch.setattr(specs.device, "compute_capability", lambda: (9, 0))
    assert specs.resolve_implementation(settings) == "transformer_engine"


class OneAttention(nn.Module):
    """Stands for a transformer block: attention by the context's tables, with a bias that padding rows would show."""

    def forward(self, *, hidden_states, packed_seq_params, attention_mask=None):
        context = packed_seq_params
        self.rows = hidden_states.shape[0]
        x = (hidden_states + 0.5).squeeze(1).unflatten(-1, (2, -1))
        assert context.cos.shape[0] == self.rows
        for layer in (1, 2):
            x = sdpa.attend(x, x, x, context.segments_of(layer), 1.0)
        return x.flatten(1).unsqueeze(1)


@pytest.mark.parametrize("rows", [4, 16, 36])
def test_padded_rows_change_neither_outputs_nor_gradients(rows):
    """Claim: the tower's rows are padded to the block inside of its layers, and nobody outside sees it."""

    def run(block):
        windows = SegmentTable.from_lengths([4] * (rows // 4))
        context = SequenceContext(
            segments=windows,
            layer_segments={2: SegmentTable.from_lengths([rows])},
            cos=torch.ones(rows, 2),
            sin=torch.zeros(rows, 2),
        )
        x = torch.randn(rows, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
        out = block(hidden_states=x, attention_mask=None, packed_seq_params=context)
        out.square().sum().backward()
        return out.detach(), x.grad

    plain, padded = OneAttention(), OneAttention()
    pad_rows(padded, 16)
    wanted, found = run(plain), run(padded)
    assert padded.rows % 16 == 0 and padded.rows - rows < 16 and plain.rows == rows
    for mine, theirs in zip(found, wanted):
        # The same sums in another bucketing of the segments.
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_tower_and_language_model_choose_their_attention_apart():
    """Claim: the tower's backend is its own where set, else the language model's."""
    backend = lambda model, **k: build_provider(model, **k).core_attention().keywords["backend"]  # noqa: E731
    model = ModelSettings(transformer_impl="local", attention_backend="flash")
    assert backend(model) == backend(model, tower=True) == "flash"
    apart = replace(model, vision_attention_backend="sdpa")
    assert (backend(apart), backend(apart, tower=True)) == ("flash", "sdpa")


@pytest.mark.parametrize(
    "library, names",
    [
        (TransformerConfig, {"fp8", "fp8_recipe", "fp8_param", "fp8_amax_history_len", "fp8_amax_compute_algo"}),
        (DistributedDataParallelConfig, {"fp8_param_gather"}),
        (OptimizerConfig, {"fp8_recipe"}),
    ],
)
def test_megatron_has_the_fields_that_we_set(library, names):
    """Claim: no keyword of ours is unknown to the installed megatron-core."""
    assert names <= {field.name for field in dataclasses.fields(library)}
    fields = fp8.fp8_fields(ModelSettings(fp8="delayed"))
    assert library is not TransformerConfig or set(fields) == names


class Rounded(nn.Parameter):
    """Stands for a parameter in FP8: it notes, as Transformer Engine does, what it was made of when constructed."""

    def __new__(cls, garbage: float):
        made = super().__new__(cls, torch.full((2, 2), garbage))
        made._quantizer = SimpleNamespace(scale=torch.ones(1), amax=torch.full((1,), garbage))
        made._high_precision_init_val = torch.full((2, 2), garbage)
        made.get_high_precision_init_val = made.clear_high_precision_init_val = lambda: None
        return made

    def _get_quantizer(self):
        return self._quantizer


@pytest.fixture
def rounded(monkeypatch) -> Rounded:
    monkeypatch.setattr(fp8_parameters, "is_float8tensor", lambda x: isinstance(x, Rounded))
    return Rounded(1e38)


def attributes(parameter) -> list[str]:
    return [name for name in vars(parameter) if "high_precision" in name]


def test_what_a_parameter_was_constructed_of_is_forgotten(rounded):
    """Claim: Megatron takes the numbers from before loading as soon as it finds the method, and finds none."""
    fp8_parameters.forget_construction(rounded)
    assert not attributes(rounded)


def test_master_weights_start_from_what_was_loaded(rounded):
    """Claim: Megatron gets the numbers before they were rounded, once; a frozen parameter keeps no copy of them."""
    values = torch.tensor([[0.01, -0.02], [0.03, 0.0]])
    fp8_parameters.forget_construction(rounded)
    fp8_parameters.set_values(rounded, values)
    assert torch.equal(rounded.get_high_precision_init_val(), values) and torch.equal(rounded.detach(), values)
    rounded.clear_high_precision_init_val()
    assert not attributes(rounded)
    fp8_parameters.set_values(rounded.requires_grad_(False), values)
    assert not attributes(rounded)


@pytest.mark.parametrize("largest, scale", [(0.04, 11200.0), (0.0, 1.0)])
def test_memory_before_loading_sets_no_scale(rounded, largest, scale):
    """Claim: under delayed scaling the largest number so far and the scale are those of what was loaded."""
    fp8_parameters.set_values(rounded, torch.tensor([[largest, 0.0], [0.0, -largest / 2]]))
    assert float(rounded._quantizer.amax) == pytest.approx(largest)
    assert float(rounded._quantizer.scale) == pytest.approx(scale)


def test_rows_of_a_pack_follow_the_recipe():
    """Claim: a recipe with larger blocks asks for longer multiples."""
    assert [fp8_multiple(recipe) for recipe in (None, *RECIPES)] == [1, 16, 16, 32, 128]


DOT_PRODUCT_ATTENTION = {
    "__init__": "num_attention_heads kv_channels num_gqa_groups attention_dropout qkv_format attn_mask_type "
    "window_size bottom_right_diagonal softcap sequence_parallel tp_size get_rng_state_tracker tp_group layer_number "
    "attention_type cp_group cp_global_ranks cp_stream cp_comm_type softmax_scale softmax_type return_max_logit name",
    "forward": "query_layer key_layer value_layer attention_mask qkv_format cu_seqlens_q cu_seqlens_kv "
    "cu_seqlens_q_padded cu_seqlens_kv_padded max_seqlen_q max_seqlen_kv attn_mask_type window_size",
}
"""Arguments of ``DotProductAttention`` (of ``forward`` the first) as transformer-engine 2.20.2 declares them."""


def test_transformer_engine_takes_our_arguments():
    """Claim: every keyword that we hand to DotProductAttention is one of its own."""
    made, called = varlen_kernels._te_module.__wrapped__, varlen_kernels._transformer_engine
    for function, method in ((made, "__init__"), (called, "forward")):
        calls = [n for n in ast.walk(ast.parse(inspect.getsource(function))) if isinstance(n, ast.Call)]
        ours = {k.arg for call in calls for k in call.keywords} - {"maxsize"}  # of the cache around it
        assert len(ours) >= 4 and ours <= set(DOT_PRODUCT_ATTENTION[method].split())


def test_te_kernel_call_matches_the_recorded_signature(monkeypatch):
    """Claim: what reaches DotProductAttention is packed, masked as padding, with int32 offsets and both lengths."""
    seen = {}

    def module(query, key, value, **keywords):
        seen.update(keywords)
        return query.flatten(1)

    monkeypatch.setattr(varlen_kernels, "_te_module", lambda *arguments: module)
    table = SegmentTable.from_lengths([3, 5])
    x = torch.zeros(8, 2, 4)
    out = varlen.attend_with(varlen_kernels._transformer_engine, x, x, x, table, 0.5)
    assert out.shape == x.shape
    assert seen["qkv_format"] == "thd" and seen["attn_mask_type"] == "padding"
    assert seen["cu_seqlens_q"].tolist() == seen["cu_seqlens_kv"].tolist() == [0, 3, 8]
    assert np.array_equal([seen["max_seqlen_q"], seen["max_seqlen_kv"]], [5, 5])


@pytest.mark.parametrize("outside", [None, "1"])
def test_te_attention_is_refused_where_it_has_no_fused_kernel(monkeypatch, outside):
    """Claim: Transformer Engine chooses among fused kernels alone, and Megatron, which sets the same variable to 1 for
    each language model and accepts no other value, finds what it left."""
    seen = []

    def module(query, key, value, **keywords):
        seen.append(os.environ.get("NVTE_UNFUSED_ATTN"))
        if len(seen) > 1:
            raise ValueError("no kernel")
        return query.flatten(1)

    monkeypatch.setattr(varlen_kernels, "_te_module", lambda *arguments: module)
    if outside is None:
        monkeypatch.delenv("NVTE_UNFUSED_ATTN", raising=False)
    else:
        monkeypatch.setenv("NVTE_UNFUSED_ATTN", outside)
    table, x = SegmentTable.from_lengths([3, 5]), torch.zeros(8, 2, 4)
    varlen.attend_with(varlen_kernels._transformer_engine, x, x, x, table, 0.5)
    with pytest.raises(ValueError, match="no kernel"):
        varlen.attend_with(varlen_kernels._transformer_engine, x, x, x, table, 0.5)
    assert seen == ["0", "0"] and os.environ.get("NVTE_UNFUSED_ATTN") == outside
