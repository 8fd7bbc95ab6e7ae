"""How a segment table runs on SDPA: which segments share a call, what is padded, what is masked.

The plan minimises computed query-key pairs plus a price per call. Two ways compete for a table: its segments as they
are, and its samples whole under a mask, which wastes pairs and saves calls and so wins for samples of a few dozen
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_cocoa.model.segments import SegmentTable
from megatron_cocoa.parallel.device import upload

CALL_COST = 2**24
"""Query-key pairs times channels (heads x head_dim) that take as long as one more attention call, forward and
backward: below this, padding beats another bucket. Measured on two CPU cores, where waiting for the other core is most
of it (a quarter of this on one core). A GPU's launch is dearer still, so more is padded away there, not less."""


@dataclass(frozen=True)
class Bucket:
    """Segments that run as one call.

    q_rows, k_rows: which rows of the pack, ``(N * Q,)`` and ``(N * K,)``; a slice where they are contiguous.
    mask:           bool, False where a query may not look: ``(N, 1, 1, K)`` for padding alone, ``(N, 1, Q, K)``
                    where whole samples run under their mask; None where all is visible or ``causal``.
    padded_q:       which of the N * Q rows are padding; None if none is.
    """

    num: int
    q_len: int
    k_len: int
    causal: bool
    q_rows: Tensor | slice
    k_rows: Tensor | slice
    mask: Tensor | None
    padded_q: Tensor | None

    @property
    def is_square(self) -> bool:
        """Whether who sees whom depends on the query's row."""
        return self.causal or (self.mask is not None and self.mask.shape[2] > 1)


@dataclass(frozen=True)
class SdpaPlan:
    """Buckets, and for each row of the pack its row in their concatenated outputs (None: already in order)."""

    buckets: tuple[Bucket, ...]
    output_rows: Tensor | None
    is_one_view: bool
    """A single bucket that holds all rows in order, as queries and as keys."""


def build_plan(table: SegmentTable, device: torch.device, *, channels: int = 1) -> SdpaPlan:
    """Sort a table's segments, or its samples, into buckets and place the index tensors on ``device``.

    Args:
        table: of the pack.
        device: of queries and keys.
        channels: query heads x head_dim, what a query-key pair costs.
    """
    call_cost = CALL_COST / channels
    blocks, masked = table.rows, False
    groups, cost = _group(blocks, table.causal, call_cost)
    samples = _whole_samples(table)
    if samples is not None:
        whole_groups, whole_cost = _group(samples, np.zeros(len(samples), dtype=bool), call_cost)
        if whole_cost < cost:
            blocks, masked, groups = samples, True, whole_groups
    buckets: list[Bucket] = []
    output_rows = np.empty(table.length, dtype=np.int64)
    done = 0
    for members in groups:
        causal = not masked and bool(table.causal[members[0]])
        bucket, q_rows, valid = _build_bucket(table, blocks[members], device, causal=causal, masked=masked)
        output_rows[q_rows[valid]] = done + np.flatnonzero(valid)
        buckets.append(bucket)
        done += len(q_rows)
    in_order = done == table.length and np.array_equal(output_rows, np.arange(table.length))
    whole = slice(0, table.length)
    one_view = in_order and len(buckets) == 1 and buckets[0].q_rows == whole and buckets[0].k_rows == whole
    return SdpaPlan(tuple(buckets), None if in_order else upload(output_rows, device), one_view)


def _whole_samples(table: SegmentTable) -> np.ndarray | None:
    """Runs of segments whose keys lie within their own query rows, as rows of a table; None if each is one segment."""
    if len(table.rows) < 2:
        return None
    q_start, _, k_start, k_end = table.rows.T
    reached = np.maximum.accumulate(k_end)[:-1]
    needed = np.minimum.accumulate(k_start[::-1])[::-1][1:]
    first = np.flatnonzero(np.concatenate([[True], (reached <= q_start[1:]) & (needed >= q_start[1:])]))
    if len(first) == len(table.rows):
        return None
    edges = np.append(q_start[first], table.length)
    return np.stack([edges[:-1], edges[1:], edges[:-1], edges[1:]], axis=1)


def _build_bucket(table: SegmentTable, rows: np.ndarray, device: torch.device, *, causal: bool, masked: bool):
    q_rows, q_valid = _padded_rows(rows[:, 0], rows[:, 1])
    k_rows, k_valid = _padded_rows(rows[:, 2], rows[:, 3])
    mask = None
    if masked:
        low, high = (x[q_rows][:, None, :, None] for x in table.key_ranges())
        columns = k_rows[:, None, None, :]
        mask = (low <= columns) & (columns < high) & k_valid[:, None, None, :]
    # Under a causal mask padding keys lie after every real query: no mask is needed.
    elif not causal and not k_valid.all():
        mask = k_valid[:, None, None, :]
    padded = np.flatnonzero(~q_valid.ravel())
    bucket = Bucket(
        num=len(rows),
        q_len=q_rows.shape[1],
        k_len=k_rows.shape[1],
        causal=causal,
        q_rows=_as_index(q_rows.ravel(), device),
        k_rows=_as_index(k_rows.ravel(), device),
        mask=None if mask is None else upload(mask, device),
        padded_q=upload(padded, device) if len(padded) else None,
    )
    return bucket, q_rows.ravel(), q_valid.ravel()


def _padded_rows(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``[start, end)`` of each segment, padded to the longest with its first row, and which are real."""
    offsets = np.arange(int((end - start).max()))
    valid = offsets[None, :] < (end - start)[:, None]
    return np.where(valid, start[:, None] + offsets[None, :], start[:, None]), valid


def _as_index(rows: np.ndarray, device: torch.device) -> Tensor | slice:
    if np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return slice(int(rows[0]), int(rows[0]) + len(rows))
    return upload(rows, device)


def _group(rows: np.ndarray, causal: np.ndarray, call_cost: float) -> tuple[list[np.ndarray], float]:
    """Partition segments into buckets at the least cost of padded pairs plus calls, and that cost in pairs.

    Single-row queries (bridges) and causal segments are kept apart; within each class, segments sorted by
    size are cut into runs by dynamic programming over the distinct sizes.
    """
    q_len, k_len = rows[:, 1] - rows[:, 0], rows[:, 3] - rows[:, 2]
    groups: list[np.ndarray] = []
    total = 0.0
    classes = causal.astype(np.int64) * 2 + (q_len == 1)
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        members = members[np.lexsort((members, q_len[members], k_len[members]))]
        shapes = np.stack([k_len[members], q_len[members]], axis=1)
        _, first, counts = np.unique(shapes, axis=0, return_index=True, return_counts=True)
        order = np.argsort(first)
        cuts, cost = _cheapest_runs(shapes[first[order]], counts[order], call_cost)
        total += cost
        edges = np.concatenate([[0], np.cumsum(counts[order])])
        groups += [np.sort(members[edges[a] : edges[b]]) for a, b in cuts]
    return groups, total


def _cheapest_runs(shapes: np.ndarray, counts: np.ndarray, call_cost: float) -> tuple[list[tuple[int, int]], float]:
    """Cut distinct shapes (sorted by keys) into runs ``[a, b)`` at the least padded pairs + ``call_cost`` per run."""
    m = len(shapes)
    best = np.full(m + 1, np.inf)
    best[0] = 0.0
    previous = np.zeros(m + 1, dtype=np.int64)
    for b in range(1, m + 1):
        a = np.arange(b)
        widest = np.maximum.accumulate(shapes[b - 1 :: -1, 1])[::-1]
        num = np.cumsum(counts[:b][::-1])[::-1]
        cost = best[a] + call_cost + num * shapes[b - 1, 0] * widest
        previous[b] = int(np.argmin(cost))
        best[b] = cost[previous[b]]
    runs, b = [], m
    while b:
        runs.append((int(previous[b]), b))
        b = int(previous[b])
    return runs[::-1], float(best[m])
