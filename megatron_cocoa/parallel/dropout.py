"""Dropout whose masks are equal where a tensor is replicated, and independent where ranks hold different parts.

A mask on a tensor that all tensor-parallel ranks hold must be one mask: each rank computes its slice of the next
product from it, and they reduce gradients as if their inputs were equal. A mask on a shard must differ from rank to
rank. Both kinds come from random states that Megatron tracks, so that activation recompute draws the same masks again.
"""

from __future__ import annotations

import hashlib

from megatron.core import parallel_state
from torch import Tensor
from torch.nn import functional as F

from megatron_cocoa.parallel import device

_REPLICATED, _SHARDED = "dropout-replicated", "dropout-sharded"


def seed_dropout(seed: str) -> None:
    """Start both random states of this rank from ``seed``; data-, context- and pipeline-parallel ranks draw apart."""
    place = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    device.set_random_state(_REPLICATED, _number(f"{seed}/{_REPLICATED}/{place}"))
    tensor = parallel_state.get_tensor_model_parallel_rank()
    device.set_random_state(_SHARDED, _number(f"{seed}/{_SHARDED}/{place}/{tensor}"))


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def dropout(x: Tensor, probability: float, *, is_sharded: bool) -> Tensor:
    """Zero each value of ``x`` with ``probability`` and scale the others by ``1 / (1 - probability)``.

    Args:
        x: any shape, local.
        probability: in [0, 1).
        is_sharded: whether tensor-parallel ranks hold different parts of ``x`` rather than equal copies.

    Raises:
        KeyError: (on a GPU Megatron's plain ``Exception``) if ``seed_dropout`` was not called at this layout.
    """
    with device.random_state(_SHARDED if is_sharded else _REPLICATED):
        return F.dropout(x, probability)
