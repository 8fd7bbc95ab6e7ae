"""Data parallelism: Megatron's DDP around the chunks, and the hooks that its schedules call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import nn

from megatron_cocoa.config import ParallelSettings
from megatron_cocoa.model.build import Model
from megatron_cocoa.parallel.fp8_parameters import follow_gathered


def wrap_data_parallel(model: Model, parallel: ParallelSettings) -> Model:
    """``model`` with each chunk in Megatron's DDP.

    Gradients are kept and reduced in FP32. They are *summed* over data- and context-parallel ranks: losses are
    already divided by global counts, so nothing is averaged and the layout never changes the gradient.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        check_for_nan_in_grad=False,
        fp8_param_gather=model.config.fp8_param,
    )
    config = model.config
    _fuse_gradient_accumulation(model)
    wrapped = [
        DistributedDataParallel(config=config, ddp_config=ddp_config, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(model.chunks)
    ]
    config.finalize_model_grads_func = finalize_without_token_count
    if parallel.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([chunk.no_sync for chunk in wrapped])
        if parallel.pipeline_model_parallel_size > 1:
            config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in wrapped])
    if parallel.overlap_param_gather:
        config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in wrapped])
    return replace(model, chunks=wrapped)


def _fuse_gradient_accumulation(model: Model) -> None:
    """Transformer Engine's weight gradients go straight into DDP's FP32 buffer, by the product that computes them.

    Set here, not in the config: without DDP there is no such buffer, and Megatron's own linears need apex for it.
    """
    for chunk in model.chunks:
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True


@contextlib.contextmanager
def whole_parameters(model: Model) -> Iterator[None]:
    """Inside, the parameters are those of the last update, for reading, and stay so in forward passes.

    With ``overlap_param_gather`` an update is gathered by hooks of the next forward pass only.
    """
    hooked = _with_hooks(model)
    gather_parameters(model)
    sync, model.config.param_sync_func = model.config.param_sync_func, None
    try:
        yield
    finally:
        model.config.param_sync_func = sync
        for chunk in hooked:
            chunk.enable_forward_pre_hook()


def gather_parameters(model: Model) -> None:
    """End training: gather the last update, and gather no more; every rank calls it."""
    for chunk in _with_hooks(model):
        chunk.disable_forward_pre_hook(param_sync=True)
        # Megatron-Core 0.16 leaves this to the hooks, which find nothing to do after a gather without them.
        follow_gathered(chunk.parameters())


def _with_hooks(model: Model) -> list[DistributedDataParallel]:
    return [chunk for chunk in model.chunks if chunk.remove_forward_pre_hook_handles]


def _one_or_all(functions: list):
    return functions[0] if len(functions) == 1 else functions


def finalize_without_token_count(model: list[nn.Module], num_tokens=None, **kwargs) -> None:
    """Megatron's gradient reductions, without its division by one token count: terms have a count each."""
    finalize_model_grads(model, None, **kwargs)
