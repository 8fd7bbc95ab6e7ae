"""Optimizer state for a checkpoint, around three errors of Megatron-Core's.

The distributed optimizer gathers its state bucket by bucket, without the padding at each bucket's end, and then cuts
parameters out at offsets that count that padding (megatron-core 0.16 to 0.19; NVIDIA/Megatron-LM pull request 5077).
With more than one bucket in a buffer (overlapped gradient reduction, or tied embeddings over pipeline stages) all
parameters behind the first padding would be saved from the wrong place. Here the padding is put back before the cut.

The plain optimizer of a BF16 model counts its BF16 parameters alone where it looks up names, but all of them where it
numbers states. With an FP32 one among them (DoRA's magnitudes, a learned temperature) no checkpoint can be saved. Here
it takes an FP32 parameter for its own master weight.

Its list of master weights has an empty entry where a pipeline stage has no parameter of a group: LoRA's matrices fall
under weight decay, a learned temperature on the last stage does not. From the first rank, that entry goes into what all
ranks share, and no rank can merge it with its own list when it loads. Here the list holds the other entries alone.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_SIGN_OF_THE_ERROR = "padded with zeros"
"""In the warning by which the faulty method covers what it reads behind the end; gone where it is mended."""

_MASTERS = "fp32_from_fp16_params"


def optimizer_sharded_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, is_loading: bool, metadata: dict[str, Any]
) -> dict[str, Any]:
    """``optimizer.sharded_state_dict``, with every parameter's state in its own place.

    Args:
        optimizer: Megatron's, of whatever kind.
        model_state: the model's sharded state dict.
        is_loading, metadata: as Megatron takes them.
    """
    repaired = _parts(optimizer, DistributedOptimizer) if _has_error() else []
    for part in repaired:
        part.get_parameter_state_dp_zero = functools.partial(_with_padding, part, part.get_parameter_state_dp_zero)
    try:
        with _all_parameters_in_order(optimizer):
            state = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    finally:
        for part in repaired:
            del part.get_parameter_state_dp_zero
    if _MASTERS in state:
        state[_MASTERS] = [group for group in state[_MASTERS] if group]
    return state


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict`` of what ``optimizer_sharded_state`` has described and a checkpoint has filled."""
    if not _parts(optimizer, DistributedOptimizer):
        adam = state.get("optimizer", state)
        # A pipeline stage on which nothing trains has no state, and checkpoints drop what is empty.
        adam.setdefault("state", {})
        # Groups are those of the first rank, where Transformer Engine's Adam counts no step of one without parameters.
        steps = [group["step"] for group in adam["param_groups"] if "step" in group]
        for group in adam["param_groups"] if steps else []:
            group["step"] = max(steps)
    with _all_parameters_in_order(optimizer):
        for part in _parts(optimizer, Float16OptimizerWithFloat16Params):
            saved = iter(state.get(_MASTERS, ()))
            state[_MASTERS] = [next(saved) if group else [] for group in part.fp32_from_float16_groups]
        optimizer.load_state_dict(state)


@contextlib.contextmanager
def _all_parameters_in_order(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside, the plain optimizer's groups of BF16 parameters and of their master weights hold the FP32 ones too, in
    the order of their states."""
    parts = _parts(optimizer, Float16OptimizerWithFloat16Params)
    before = [(part.float16_groups, part.fp32_from_float16_groups) for part in parts]
    for part, groups in zip(parts, before):
        of_master = {id(m): p for group, masters in zip(*groups) for p, m in zip(group, masters)}
        part.fp32_from_float16_groups = [list(group["params"]) for group in part.param_groups]
        part.float16_groups = [[of_master.get(id(m), m) for m in ms] for ms in part.fp32_from_float16_groups]
    try:
        yield
    finally:
        for part, groups in zip(parts, before):
            part.float16_groups, part.fp32_from_float16_groups = groups


@functools.cache
def _has_error() -> bool:
    return _SIGN_OF_THE_ERROR in inspect.getsource(DistributedOptimizer.sharded_param_state_fully_reshardable)


def _parts(optimizer: MegatronOptimizer, kind: type[MegatronOptimizer]) -> list:
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in parts if isinstance(part, kind)]


def _with_padding(part: DistributedOptimizer, gather, *args, **kwargs) -> dict | None:
    """Megatron's gathered state with each bucket where ``param_index_map`` expects it."""
    state = gather(*args, **kwargs)
    if state is None:
        return None
    for index, buffer in enumerate(part.buffers):
        for tensors in state[index].values():
            for name, packed in tensors.items():
                if isinstance(packed, Tensor):
                    tensors[name] = spread_buckets(packed, _buckets(buffer), size=buffer.numel)
    return state


def _buckets(buffer) -> list[tuple[int, int]]:
    return [(bucket.offset, bucket.numel_unpadded) for bucket in buffer.buckets]


def spread_buckets(packed: Tensor, buckets: list[tuple[int, int]], *, size: int) -> Tensor:
    """Lay out buckets that follow one another without gaps at their own offsets.

    Args:
        packed: ``(sum of lengths,)``.
        buckets: ``(offset, length)`` of each, in order.
        size: elements of the result; what no bucket fills is zero.
    """
    spread = torch.zeros(size, dtype=packed.dtype, device=packed.device)
    start = 0
    for offset, length in buckets:
        spread[offset : offset + length] = packed[start : start + length]
        start += length
    assert start == packed.numel(), (start, packed.numel())
    return spread
