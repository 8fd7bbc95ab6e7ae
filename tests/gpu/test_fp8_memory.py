"""Bytes of weights that Transformer Engine holds in FP8 after a step, beside those that are computed."""

from dataclasses import replace

import pytest
import torch

from megatron_cocoa.config import BridgeSettings, FreezeSettings, ModelSettings, ParallelSettings, TrainSettings
from megatron_cocoa.model.build import Model, build_model
from megatron_cocoa.model.fp8 import fp8_multiple
from megatron_cocoa.model.specs import resolve_implementation
from megatron_cocoa.objectives import build_objective
from megatron_cocoa.parallel import device, topology
from megatron_cocoa.parallel.fp8_parameters import set_values
from megatron_cocoa.planning.memory import stage_memory
from megatron_cocoa.planning.packs import PackShape
from megatron_cocoa.training.data_parallel import wrap_data_parallel
from megatron_cocoa.training.optimizer import build_optimizer
from megatron_cocoa.training.step import forward_backward
from tests.distributed.memory import small_architecture, small_batch

pytestmark = pytest.mark.gpu

DATA = ("_data", "_transpose", "_rowwise_data", "_columnwise_data", "_rowwise_scale_inv", "_columnwise_scale_inv")
"""Tensors of a rounded weight, by Transformer Engine's names; a tensor's one scale aside."""


@pytest.fixture(scope="module", autouse=True)
def single_gpu():
    topology.initialize(ParallelSettings(), topology.LaunchInfo(0, 1, 0), seed=0)
    yield
    topology.shutdown()


def held_bytes(model: Model) -> int:
    """Of parameters, and of the copies that linears keep."""
    modules = [module for chunk in model.bare_chunks for module in chunk.modules()]
    kept = [p for module in modules for p in module.parameters(recurse=False)]
    kept += [copy for module in modules for copy in getattr(module, "_fp8_workspaces", {}).values()]
    return sum(x.numel() * x.element_size() for weight in kept for x in tensors_of(weight))


def tensors_of(weight: torch.Tensor) -> list[torch.Tensor]:
    if not hasattr(weight, "_fp8_dtype"):
        return [weight]
    found = {name: getattr(weight, name, None) for name in DATA}
    if getattr(weight, "_transpose_invalid", False):
        del found["_transpose"]
    return [x for x in found.values() if x is not None]


@pytest.mark.parametrize(
    "more",
    [{}, {"fp8_vision": True}, {"fp8_vision": True, "fp8_param": True}, {"fp8_vision": True, "freeze": True}],
    ids=["", "vision", "param", "frozen"],
)
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_weights_in_fp8_are_counted(recipe, more):
    """Claim: after two steps a rank holds as many bytes of weights, and of their copies, as are computed.

    Of a chip that reads copies by columns: Blackwell keeps none of them under these recipes.
    """
    try:
        resolve_implementation(ModelSettings(fp8=recipe))
    except ValueError as reason:
        pytest.skip(str(reason))
    if (device.compute_capability() or (9, 0)) >= (10, 0):
        pytest.skip("Blackwell keeps no copy by columns")
    settings = TrainSettings(
        model=ModelSettings(dtype="bf16", vision_ffn_multiple=128, fp8=recipe),
        parallel=ParallelSettings(use_distributed_optimizer=True),
        bridge=BridgeSettings(global_batch_size=4, micro_batch_size=4, lr_warmup_steps=0),
        freeze=FreezeSettings(vision=more.get("freeze", False)),
    )
    chosen = {name: value for name, value in more.items() if name != "freeze"}
    settings = replace(settings, model=replace(settings.model, **chosen))
    architecture = small_architecture("qwen2_5_vl")
    batch = small_batch(architecture, "bridge", multiple=fp8_multiple("blockwise"), seed=0)
    bare = build_model(architecture, settings, with_image_decoder=False, mask_token_id=7)
    with torch.no_grad():
        for parameter in bare.bare_chunks[0].parameters():
            set_values(parameter, 0.02 * torch.randn(parameter.shape))
    model = wrap_data_parallel(bare, settings.parallel)
    optimizer, _ = build_optimizer(model, settings.bridge, settings.optimizer, settings.parallel)
    for _ in range(2):
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(model, build_objective("bridge", settings), [batch.to(device.device())])
        optimizer.step()
    (plan,) = stage_memory(architecture, settings, "bridge", world_size=1, pack=PackShape.of(batch, architecture))
    assert plan.parameters == held_bytes(model)
