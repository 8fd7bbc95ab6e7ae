"""Exact nearest neighbours by cosine among more vectors than memory holds, on a GPU where there is one.

Vectors are read block by block and multiplied by torch, which uses all cores. For each query only its best places are
kept, each as one integer: the cosine to ``DECIMALS`` decimals above, the place below. So no two compare as equal, also
where many targets are: the size of the blocks decides nothing, and the order of sums inside a library hardly ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_cocoa.parallel import device
from megatron_cocoa.parallel.threads import map_ahead

DECIMALS = 6
QUERY_BYTES = 2**29
"""Of the queries that are searched for at a time, and their best; each such block reads all targets once."""
TARGET_BYTES = 2**26
"""Of the targets that are read at a time."""
SCORE_BYTES = 2**26
"""Of the cosines that exist at a time."""

_SCALE, _PLACE_BITS = float(10**DECIMALS), 32
_NONE = torch.iinfo(torch.int64).min


class Vectors(Protocol):
    """float32 ``(rows, hidden)``, rows of length one, in memory or on a disk; indexed by a slice or by row numbers."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray: ...


@torch.no_grad()
def nearest(
    queries: Vectors, targets: Vectors, among: np.ndarray, depth: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Search for all queries, a block at a time.

    Args:
        queries, targets: of one length.
        among: int64 ``(candidates,)``, the rows of ``targets`` that are candidates; a place counts in it.
        depth: neighbours of each query, at most as many as there are candidates.

    Yields:
        The number of a block's first query; int64 places and float32 cosines, rounded to ``DECIMALS``, each
        ``(queries, depth)``, best first, equal ones in the order of their places.
    """
    row_bytes = 4 * targets.shape[1]
    many, few = max(1, QUERY_BYTES // (row_bytes + 8 * depth)), max(1, TARGET_BYTES // row_bytes)
    for start in range(0, len(queries), many):
        block = device.upload(np.ascontiguousarray(queries[start : start + many]), device.device())
        keys = torch.full((len(block), depth), _NONE, device=block.device)
        # The next targets are read while these are multiplied.
        parts = map_ahead(
            lambda first: (first, np.ascontiguousarray(targets[among[first : first + few]])),
            range(0, len(among), few),
            num_workers=1,
            num_ahead=2,
        )
        for first, part in parts:
            part = device.upload(part, block.device)
            rows = max(1, SCORE_BYTES // (4 * len(part)))
            for query in range(0, len(block), rows):
                _merge(keys[query : query + rows], block[query : query + rows] @ part.T, first)
        keys = keys.cpu()
        rounded = _rounded(keys)
        yield start, ((rounded << _PLACE_BITS) - keys).numpy(), (rounded / _SCALE).float().numpy()


def _merge(keys: Tensor, scores: Tensor, first: int) -> None:
    """Take what belongs among the best into ``keys``.

    Args:
        keys: int64 ``(queries, depth)``, best first, changed in place.
        scores: float32 ``(queries, targets)``.
        first: place of the first of these targets; all places before were merged already.
    """
    depth, targets = keys.shape[1], scores.shape[1]
    # An equal one comes after those that are kept, since its place does.
    least = _rounded(keys[:, -1:]) + 1 if first else _guess(scores, depth)
    fresh = _at_least(least, scores, first)
    best = None if fresh is None else _best(keys, fresh)
    if best is None or (not first and bool((_rounded(best[:, -1:]) < least).any())):
        fresh = _keys(scores, torch.arange(first, first + targets, device=scores.device))
        best = _best(keys, fresh.topk(min(depth, targets), dim=1).values)
    keys.copy_(best)


def _guess(scores: Tensor, depth: int) -> Tensor:
    """int64 ``(queries, 1)``, a rounded cosine that more than ``depth`` of a query's reach, but not many more.

    Every eighth tells, which holds where their order is that of chance: of the best it has an eighth, and hardly ever
    five standard deviations more.
    """
    mean, sample = depth / 8, scores[:, ::8]
    rank = min(math.ceil(mean + 5 * mean**0.5), sample.shape[1])
    lowest = sample.topk(rank, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    return (lowest * _SCALE).round().long()


def _at_least(least: Tensor, scores: Tensor, first: int) -> Tensor | None:
    """The keys of all scores that may round to ``least`` or more, ``_NONE`` behind those of a query that has fewer.

    Returns:
        int64 ``(queries, most of a query)``; None where there are so many that to make the key of each takes less.
    """
    found = scores > (least - 0.75) / _SCALE
    if int(found.count_nonzero()) > scores.numel() // 4:
        return None
    row, column = found.nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(scores))
    keys = least.new_full((len(scores), int(counts.max())), _NONE)
    place_in_row = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    keys[row, place_in_row] = _keys(scores[row, column], column + first)
    return keys


def _best(keys: Tensor, fresh: Tensor) -> Tensor:
    return torch.cat([keys, fresh], dim=1).topk(keys.shape[1], dim=1).values if fresh.shape[1] else keys


def _keys(scores: Tensor, places: Tensor) -> Tensor:
    """Integers that are larger for a larger rounded cosine, and for an earlier place where it is equal."""
    keys = (scores * _SCALE).round_().long()
    keys <<= _PLACE_BITS
    keys -= places
    return keys


def _rounded(keys: Tensor) -> Tensor:
    return (keys + 2**_PLACE_BITS - 1) >> _PLACE_BITS
