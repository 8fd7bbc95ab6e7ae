"""Optimizer state for a checkpoint, around an error of Megatron-Core's that would corrupt it silently.

The distributed optimizer gathers its state bucket by bucket, without the padding at each bucket's end, and then cuts
parameters out at offsets that count that padding (megatron-core 0.16 to 0.19; NVIDIA/Megatron-LM pull request 5077).
With more than one bucket in a buffer (overlapped gradient reduction, or tied embeddings over pipeline stages) all
parameters behind the first padding would be saved from the wrong place. Here the padding is put back before the cut.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_SIGN_OF_THE_ERROR = "padded with zeros"
"""In the warning by which the faulty method covers what it reads behind the end; gone where it is mended."""


def optimizer_sharded_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, is_loading: bool, metadata: dict[str, Any]
) -> dict[str, Any]:
    """``optimizer.sharded_state_dict``, with every parameter's state in its own place.

    Args:
        optimizer: Megatron's, of whatever kind.
        model_state: the model's sharded state dict.
        is_loading, metadata: as Megatron takes them.
    """
    repaired = _distributed_parts(optimizer) if _has_error() else []
    for part in repaired:
        part.get_parameter_state_dp_zero = functools.partial(_with_padding, part, part.get_parameter_state_dp_zero)
    try:
        return optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    finally:
        for part in repaired:
            del part.get_parameter_state_dp_zero


@functools.cache
def _has_error() -> bool:
    return _SIGN_OF_THE_ERROR in inspect.getsource(DistributedOptimizer.sharded_param_state_fully_reshardable)


def _distributed_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in parts if isinstance(part, DistributedOptimizer)]


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
