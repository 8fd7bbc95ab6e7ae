"""Cross-entropy over a vocabulary that tensor-parallel ranks share, with the logits as its only large tensor.

Megatron's keeps a softmax in float32, twice as large as BF16 logits, and passes over it seven times. This one keeps the
logits and two numbers a row, writes nothing as large on the way forward, and their gradient over them on the way back.
Everything is computed in float32, in blocks that fit a core's cache or by one kernel each way on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cocoa.parallel.device import is_on_gpu

BLOCK_ELEMENTS = 2**20
"""Elements of a block on a CPU. Rows are as long as the vocabulary: smaller blocks would be one row, or less than the
threads need to be worth waking."""


def vocab_parallel_nll(logits: Tensor, labels: Tensor, *, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """Negative log-likelihood of each row's label.

    The backward pass overwrites ``logits``, so that nobody else may keep them; a second one is refused.

    Args:
        logits: contiguous ``(rows, columns)``: this rank's slice; the ranks' follow one another.
        labels: int64 ``(rows,)``, below ``vocab_size``; the same on every rank.
        vocab_size: columns over all ranks that take part; those behind them are padding, whatever they hold.
        group: the tensor-parallel group.

    Returns:
        float32 ``(rows,)`` in nats, the same on every rank.
    """
    first = logits.shape[1] * group.rank()
    width = min(max(vocab_size - first, 0), logits.shape[1])
    return _VocabParallelNLL.apply(logits, labels - first, width, group)


class _VocabParallelNLL(torch.autograd.Function):
    """Of local ``labels``, any that are out of ``[0, width)`` belonging to other ranks."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, width: int, group: dist.ProcessGroup) -> Tensor:
        largest, total, own = _statistics(logits, labels, width)
        if group.size() > 1:
            here = largest.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack([total * (here - largest).exp_(), own])
            dist.all_reduce(sums, group=group)
            total, own = sums
        ctx.save_for_backward(logits, labels, largest, total)
        ctx.width = width
        return total.log() + (largest - own)

    @staticmethod
    def backward(ctx, grad: Tensor):
        logits, labels, largest, total = ctx.saved_tensors
        _overwrite_by_gradient(logits, labels, ctx.width, largest, total, grad)
        return logits, None, None, None


def _statistics(logits: Tensor, labels: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three float32 ``(rows,)`` of each row's first ``width`` columns: the largest, the sum of all exponentials
    relative to it, and the label's (0 if it is not among them)."""
    if is_on_gpu(logits):
        from megatron_cocoa.model import kernels

        return kernels.softmax_statistics(logits, labels, width)
    largest = logits.new_full(labels.shape, torch.finfo(torch.float32).min, dtype=torch.float32)
    total, own = torch.zeros_like(largest), torch.zeros_like(largest)
    if width:
        columns, is_here = _labels_here(labels, width)
        own = logits.gather(1, columns).float().mul_(is_here).squeeze(1)
        for rows in _blocks(logits):
            part = logits[rows, :width].float()
            torch.amax(part, dim=1, out=largest[rows])
            torch.sum((part - largest[rows, None]).exp_(), dim=1, out=total[rows])
    return largest, total, own


def _overwrite_by_gradient(
    logits: Tensor, labels: Tensor, width: int, largest: Tensor, total: Tensor, grad: Tensor
) -> None:
    """``logits`` become softmax times ``grad``, less ``grad`` at the label; zeros in the columns from ``width`` on."""
    if is_on_gpu(logits):
        from megatron_cocoa.model import kernels

        kernels.softmax_gradient(logits, labels, width, largest, total, grad)
        torch.autograd.graph.increment_version(logits)
        return
    logits[:, width:] = 0
    if width:
        columns, is_here = _labels_here(labels, width)
        scale, less = (grad / total).unsqueeze(1), (-grad).unsqueeze(1) * is_here
        for rows in _blocks(logits):
            part = logits[rows, :width]
            wide = part.float().sub_(largest[rows, None]).exp_().mul_(scale[rows])
            part.copy_(wide.scatter_add_(1, columns[rows], less[rows]))


def _labels_here(labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """``(rows, 1)`` each: labels forced into ``[0, width)``, and whether they were there before."""
    labels = labels.unsqueeze(1)
    return labels.clamp(0, width - 1), (labels >= 0) & (labels < width)


def _blocks(logits: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // logits.shape[1])
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))
