"""Which part of a whole Megatron tensor a tensor-parallel rank holds: pure functions, no names, no files."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from megatron_cocoa.checkpoint.bits import same_bits


class Sharding(Enum):
    """How tensor parallelism divides a whole Megatron tensor among its ranks.

    ``COLUMN``: contiguous blocks of dimension 0, output features. The fused qkv is no exception: Megatron-Core cuts it
    so even where there are fewer KV heads than ranks, and gathers activations inside attention.
    ``GATED_COLUMN``: gate and up are cut separately, a rank holds ``[its gate; its up]``.
    ``ROW``: contiguous blocks of dimension 1, input features.
    """

    REPLICATED = "replicated"
    COLUMN = "column"
    GATED_COLUMN = "gated column"
    ROW = "row"

    @property
    def dim(self) -> int | None:
        """The dimension that is cut, None for replicated tensors."""
        return {Sharding.REPLICATED: None, Sharding.ROW: 1}.get(self, 0)


def shard(tensor: Tensor, sharding: Sharding, *, tp_rank: int, tp_size: int) -> Tensor:
    """The part of an unsharded tensor that rank ``tp_rank`` of ``tp_size`` holds; may be a view.

    Raises:
        ValueError: if the dimension does not divide, with the numbers.
    """
    if not 0 <= tp_rank < tp_size:
        raise ValueError(f"tensor parallel rank {tp_rank} does not exist among {tp_size}")
    if sharding is Sharding.REPLICATED:
        return tensor
    blocks = tp_size * (2 if sharding is Sharding.GATED_COLUMN else 1)
    if tensor.shape[sharding.dim] % blocks:
        what = "halves of gate and up" if sharding is Sharding.GATED_COLUMN else "entries"
        size = tensor.shape[sharding.dim] * tp_size // blocks
        raise ValueError(f"{size} {what} in dimension {sharding.dim} are not divisible by {tp_size} ranks")
    if sharding is Sharding.GATED_COLUMN:
        return torch.cat([half.chunk(tp_size)[tp_rank] for half in tensor.chunk(2)])
    return tensor.chunk(tp_size, dim=sharding.dim)[tp_rank]


def unshard(shards: Sequence[Tensor], sharding: Sharding) -> Tensor:
    """The unsharded tensor from all ranks' parts, in rank order: the inverse of ``shard``.

    Raises:
        ValueError: if copies of a replicated tensor differ, which means that the ranks have drifted apart.
    """
    if sharding is Sharding.REPLICATED:
        different = [rank for rank, copy in enumerate(shards) if not same_bits(copy, shards[0])]
        if different:
            raise ValueError(f"a replicated tensor differs between rank 0 and rank(s) {different}: needed equal copies")
        return shards[0]
    if sharding is Sharding.GATED_COLUMN:
        halves = [local.chunk(2) for local in shards]
        return torch.cat([half[part] for part in (0, 1) for half in halves])
    return torch.cat(list(shards), dim=sharding.dim)
