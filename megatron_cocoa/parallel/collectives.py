"""Exchanges that Megatron-Core lacks: differentiable ones over its groups, and actions of one rank for all.

Shape legend: S tokens of the whole pack, s = S / context_parallel_size local tokens, H heads on this tensor
parallel rank, D head dimension, C context parallel size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor

from megatron_cocoa.parallel import topology

Result = TypeVar("Result")


def sequence_to_heads(x_sHD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Trade a shard of the sequence for a shard of the heads (DeepSpeed-Ulysses, arXiv 2309.14509).

    Args:
        x_sHD: ``(s, H, D)``: this rank's contiguous rows, all heads. C must divide H.
        group: the context-parallel group.

    Returns:
        ``(S, H / C, D)``: all rows in global order, this rank's heads. The backward is the inverse exchange.
    """
    size = group.size()
    if size == 1:
        return x_sHD
    s, heads, dim = x_sHD.shape
    by_rank = x_sHD.reshape(s, size, heads // size, dim).transpose(0, 1).contiguous()
    return all_to_all(group, by_rank).reshape(size * s, heads // size, dim)


def heads_to_sequence(x_ShD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Inverse of ``sequence_to_heads``: ``(S, H / C, D)`` to ``(s, H, D)``."""
    size = group.size()
    if size == 1:
        return x_ShD
    total, heads, dim = x_ShD.shape
    by_source = all_to_all(group, x_ShD.contiguous()).reshape(size, total // size, heads, dim)
    return by_source.transpose(0, 1).reshape(total // size, size * heads, dim)


class _SumForwardIdentityBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum ``x``, of one shape on all ranks, over ``group``; the backward pass returns the gradient as it is.

    Correct if every rank computes the *same* loss from the sum: each rank then keeps the gradient of its own
    addend, and nothing is counted twice.
    """
    return x if group.size() == 1 else _SumForwardIdentityBackward.apply(x, group)


def from_last_stage(value: Any) -> Any:
    """Hand a small picklable value of the last pipeline stage to every stage of the replica."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return holder[0]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rows: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
        ctx.rows, ctx.group = rows, group
        most = max(rows)
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: x.shape[0]] = x
        gathered = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(gathered, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(gathered, rows)])

    @staticmethod
    def backward(ctx, grad: Tensor):
        rank = dist.get_rank(ctx.group)
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        start = sum(ctx.rows[:rank])
        return grad[start : start + ctx.rows[rank]], None, None


def gather_rows(x: Tensor, rows: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    """Concatenate each rank's rows along dimension 0, for shards of unequal size.

    Args:
        x: ``(rows[rank], ...)`` on this rank.
        rows: number of rows on each rank of ``group``, known to all without communication.

    Returns:
        ``(sum(rows), ...)`` on every rank. The backward sums the gradients of all ranks, each of which may have
        used any row, and returns this rank's slice.
    """
    return x if group.size() == 1 else _GatherRows.apply(x, rows, group)


def on_first_rank(action: Callable[[], Result], failure: str | None = None, *, is_long: bool = False) -> Result:
    """Run ``action`` on rank 0 while the others wait, and return its (picklable) result on every rank.

    Without process groups this process counts as the first rank.

    Args:
        action: called on rank 0 alone.
        failure: put before the reason in the error's message.
        is_long: the others wait as long as for files, see ``topology.file_group``.

    Raises:
        ValueError: on every rank, if ``action`` raised OSError or ValueError.
    """
    outcome: list = [None, None]
    is_alone = not dist.is_initialized()
    group = topology.file_group() if is_long and not is_alone else None
    if is_alone or dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (OSError, ValueError) as error:
            outcome[1] = str(error) if failure is None else f"{failure}: {error}"
    if not is_alone:
        dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]
