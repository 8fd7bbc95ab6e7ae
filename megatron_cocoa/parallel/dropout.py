"""Dropout whose masks are equal where a tensor is replicated, and independent where ranks hold different parts.

A mask on a tensor that all tensor-parallel ranks hold must be one mask: each rank computes its slice of the next
product from it, and they reduce gradients as if their inputs were equal. A mask on a shard must differ from rank to
rank. Both come from random states that Megatron tracks, so that recompute draws the same masks again. The trainer
seeds them by step, data-parallel rank and pipeline stage; context-parallel ranks draw from equal streams, as in
Megatron-LM.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from megatron_cocoa.parallel.random_states import random_state


def dropout(x: Tensor, probability: float, *, is_sharded: bool) -> Tensor:
    """Zero each value of ``x`` with ``probability`` and scale the others by ``1 / (1 - probability)``.

    Args:
        x: any shape, local.
        probability: in [0, 1).
        is_sharded: whether tensor-parallel ranks hold different parts of ``x`` rather than equal copies.
    """
    with random_state(differs_over_tensor_parallel=is_sharded):
        return F.dropout(x, probability)
