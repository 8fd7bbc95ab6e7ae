"""Checks of the project's own collectives, and of cross-entropy over a vocabulary in parts, on two and four ranks."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.testing import assert_close

from megatron_cocoa.model.cross_entropy import vocab_parallel_nll
from megatron_cocoa.parallel.collectives import gather_rows, heads_to_sequence, sequence_to_heads, sum_over
from tests.distributed.check import Check


def _random(*shape: int, seed: int) -> torch.Tensor:
    """The same numbers on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sequence_for_heads(world_size: int) -> None:
    """All rows of this rank's heads arrive in order; the way back is the inverse; gradients take the way back."""
    rank, group = dist.get_rank(), dist.group.WORLD
    rows, heads, dim = 3, 2 * world_size, 5
    whole, weight = _random(rows * world_size, heads, dim, seed=0), _random(rows * world_size, heads, dim, seed=1)
    mine = whole.chunk(world_size)[rank].clone().requires_grad_()
    by_heads = sequence_to_heads(mine, group)
    # Data is only moved: equality is exact.
    assert_close(by_heads, whole.chunk(world_size, dim=1)[rank], rtol=0, atol=0)
    back = heads_to_sequence(by_heads, group)
    assert_close(back, mine, rtol=0, atol=0)
    (by_heads * weight.chunk(world_size, dim=1)[rank]).sum().backward()
    assert_close(mine.grad, weight.chunk(world_size)[rank], rtol=0, atol=0)
    other = whole.chunk(world_size, dim=1)[rank].clone().requires_grad_()
    (heads_to_sequence(other, group) * weight.chunk(world_size)[rank]).sum().backward()
    assert_close(other.grad, weight.chunk(world_size, dim=1)[rank], rtol=0, atol=0)


def unequal_rows(world_size: int) -> None:
    """Shards of any size, empty ones too, are joined in rank order; each row's gradient is summed over all users."""
    rank, group = dist.get_rank(), dist.group.WORLD
    rows = (3, 0, 1, 4)[:world_size]
    whole = _random(sum(rows), 2, seed=0)
    mine = whole.split(rows)[rank].clone().requires_grad_()
    joined = gather_rows(mine, rows, group)
    assert_close(joined, whole, rtol=0, atol=0)
    weights = [_random(sum(rows), 2, seed=10 + r) for r in range(world_size)]
    (joined * weights[rank]).sum().backward()
    # The order of the sum over ranks is the library's: float64 rounding.
    assert_close(mine.grad, sum(weights).split(rows)[rank], rtol=1e-12, atol=1e-12)


def sum_with_own_gradient(world_size: int) -> None:
    """The sum is global; where all ranks compute one loss from it, each gets the gradient of its addend once."""
    rank, group = dist.get_rank(), dist.group.WORLD
    addends = [_random(4, seed=r) for r in range(world_size)]
    mine = addends[rank].clone().requires_grad_()
    total = sum_over(mine, group)
    assert_close(total, sum(addends), rtol=1e-12, atol=1e-12)
    total.square().sum().backward()
    assert_close(mine.grad, 2 * sum(addends), rtol=1e-12, atol=1e-12)


def vocabulary_in_parts(world_size: int) -> None:
    """Cross-entropy of logits cut by columns is torch's of the real ones, also where a rank holds padding alone.

    They are as far apart as in tests/unit/model/test_cross_entropy.py: what is taken off before the exponential must be
    the largest of all ranks, or a sum is zero or infinite.
    """
    rank, group, vocab_size = dist.get_rank(), dist.group.WORLD, 8 * world_size - 10
    logits = (30 * _random(5, 8 * world_size, seed=0) + 80).float()
    labels, weight = torch.linspace(0, vocab_size - 1, 5).long(), torch.arange(1.0, 6.0)
    exact = logits.double().requires_grad_()
    wanted = functional.cross_entropy(exact[:, :vocab_size], labels, reduction="none")
    wanted.backward(weight.double())
    mine = logits.chunk(world_size, dim=1)[rank].contiguous().requires_grad_()
    found = vocab_parallel_nll(mine * 1, labels, vocab_size=vocab_size, group=group)
    found.backward(weight)
    # Float32: exponentials of differences of logits of some hundred.
    assert_close(found.double(), wanted.detach(), rtol=1e-6, atol=1e-5)
    assert_close(mine.grad.double(), exact.grad.chunk(world_size, dim=1)[rank], rtol=1e-4, atol=1e-6)


CHECKS = {
    f"{function.__name__}-{world_size}": Check(world_size, functools.partial(function, world_size))
    for function in (sequence_for_heads, unequal_rows, sum_with_own_gradient, vocabulary_in_parts)
    for world_size in (2, 4)
}
