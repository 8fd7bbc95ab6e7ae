"""Modules that a layer is built of, and what their configs ask of Megatron on a GPU."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.testing import assert_close

from megatron_cocoa.config import ModelSettings, ParallelSettings, RecomputeSettings
from megatron_cocoa.model.activations import SwiGLU
from megatron_cocoa.model.specs import adding_its_bias, adding_its_bias_alone
from megatron_cocoa.model.transformer_configs import build_configs
from megatron_cocoa.parallel import device
from tests.unit.published import published_architecture

pytestmark = pytest.mark.usefixtures("single_rank")


def mlp(first: type) -> MLP:
    config = TransformerConfig(
        num_layers=1, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, gated_linear_unit=True,
        use_te_activation_func=True, use_cpu_initialization=True, add_bias_linear=True,
        gradient_accumulation_fusion=False, bias_activation_fusion=False,
    )  # fmt: skip
    built = MLP(config, MLPSubmodules(linear_fc1=first, linear_fc2=RowParallelLinear, activation_func=SwiGLU))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return built


def test_a_bias_inside_of_the_product_changes_nothing_else():
    """Claim: Megatron's MLP finds no bias to add, and computes what it did: outputs and gradients."""
    whole, apart = mlp(adding_its_bias(ColumnParallelLinear)), mlp(ColumnParallelLinear)
    x = torch.randn(5, 1, 16, generator=torch.Generator().manual_seed(1))
    assert whole.linear_fc1(x)[1] is None and apart.linear_fc1(x)[1] is not None
    found = [built(x) for built in (whole, apart)]
    # float32, in another order of additions.
    assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    for output, bias in found:
        (output.square().sum() + bias.square().sum()).backward()
    for (name, mine), theirs in zip(whole.named_parameters(), apart.parameters()):
        assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5 * float(theirs.grad.abs().max()), msg=name)


class RowParallel:
    """What is asked of Transformer Engine's, which adds its bias after the product whatever the number of ranks."""

    def __init__(self, *sizes: int, config, skip_bias_add: bool, input_is_parallel: bool):
        self.skip_bias_add, self.gemm_bias_unfused_add = skip_bias_add, True


@pytest.mark.parametrize("ranks, caller_adds", [(1, False), (2, True)])
def test_the_product_adds_the_bias_of_a_rank_alone(ranks, caller_adds):
    """Claim: a row-parallel product adds its bias itself if no other rank has a part of the sum, and only then."""
    config = SimpleNamespace(tensor_model_parallel_size=ranks)
    linear = adding_its_bias_alone(RowParallel)(4, 4, config=config, skip_bias_add=True, input_is_parallel=True)
    assert linear.skip_bias_add == caller_adds
    assert linear.gemm_bias_unfused_add == caller_adds


@pytest.mark.parametrize("on_gpu, chunks, is_freed", [(True, None, True), (True, 2, False), (False, None, False)])
def test_an_output_that_may_still_be_on_its_way_is_not_freed(monkeypatch, on_gpu, chunks, is_freed):
    """Claim: Megatron frees a stage's output after it has waited for its sending, never beside it."""
    monkeypatch.setattr(device, "has_gpu", lambda: on_gpu)
    parallel = ParallelSettings(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=chunks)
    architecture, parts = published_architecture("Qwen2.5-VL-7B"), dict(model=ModelSettings(), parallel=parallel)
    found = build_configs(architecture, **parts, recompute=RecomputeSettings()).language
    assert found.deallocate_pipeline_outputs == is_freed
    assert not (found.deallocate_pipeline_outputs and found.overlap_p2p_comm)
