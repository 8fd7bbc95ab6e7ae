"""Segments over torch's scaled-dot-product attention: the backend that runs everywhere.

A loop over segments would pay a kernel launch for each caption and each window. Segments of equal shape are
batched instead, and shapes that are close are padded to a common one where that is cheaper than another call;
padding is masked by key, so no mask is ever larger than (segments, keys). Where the batched segments lie one
after the other, queries and keys are views of the pack; else rows are gathered.

Shape legend: T rows of the pack, N segments in a bucket, Q query rows and K key rows per segment, H query heads,
G key-value heads, R = H / G, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_cocoa.model.segments import SegmentTable

CALL_COST = 16384
"""Query-key pairs that take as long as one more attention call: below this, padding beats another bucket.
Measured on CPU with 4 heads of 64; a GPU's launch is dearer still, so more is padded away there, not less."""


@dataclass(frozen=True)
class Bucket:
    """Segments that run as one call.

    q_rows, k_rows: which rows of the pack, ``(N * Q,)`` and ``(N * K,)``; a slice where they are contiguous.
    key_mask:       bool ``(N, 1, 1, K)``, False on padding; None without padding.
    """

    num: int
    q_len: int
    k_len: int
    causal: bool
    q_rows: Tensor | slice
    k_rows: Tensor | slice
    key_mask: Tensor | None


@dataclass(frozen=True)
class SdpaPlan:
    """Buckets, and for each row of the pack its row in their concatenated outputs (None: already in order)."""

    buckets: tuple[Bucket, ...]
    output_rows: Tensor | None


def attend(query: Tensor, key: Tensor, value: Tensor, table: SegmentTable, scale: float) -> Tensor:
    """Attention of a packed sequence by its segment table.

    Args:
        query: ``(T, H, D)``, local heads.
        key, value: ``(T, G, D)`` with G dividing H.
        table: who attends to whom; ``table.length == T``.
        scale: multiplies the scores before the softmax.

    Returns:
        ``(T, H, D)`` in the dtype of ``query``.
    """
    plan = table.plans.get("sdpa")
    if plan is None:
        plan = table.plans["sdpa"] = build_plan(table, query.device)
    outputs = [_run_bucket(bucket, query, key, value, scale) for bucket in plan.buckets]
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined if plan.output_rows is None else joined.index_select(0, plan.output_rows)


def _run_bucket(bucket: Bucket, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    heads, groups, dim = query.shape[1], key.shape[1], query.shape[2]
    ratio = heads // groups
    n, q_len, k_len = bucket.num, bucket.q_len, bucket.k_len
    k_NGKD, v_NGKD = (_take(x, bucket.k_rows).view(n, k_len, groups, dim).transpose(1, 2) for x in (key, value))
    q_NQGRD = _take(query, bucket.q_rows).view(n, q_len, groups, ratio, dim)
    if bucket.causal:
        q_NHQD = q_NQGRD.flatten(2, 3).transpose(1, 2)
        k_NGKD, v_NGKD = (x.repeat_interleave(ratio, dim=1) for x in (k_NGKD, v_NGKD))
        out = scaled_dot_product_attention(q_NHQD, k_NGKD, v_NGKD, is_causal=True, scale=scale)
        return out.transpose(1, 2).reshape(n * q_len, heads, dim)
    # The R query heads of a group share its keys: laid along the query axis they need no repeated keys.
    q_NGqD = q_NQGRD.permute(0, 2, 3, 1, 4).reshape(n, groups, ratio * q_len, dim)
    out = scaled_dot_product_attention(q_NGqD, k_NGKD, v_NGKD, attn_mask=bucket.key_mask, scale=scale)
    return out.view(n, groups, ratio, q_len, dim).permute(0, 3, 1, 2, 4).reshape(n * q_len, heads, dim)


def _take(x: Tensor, rows: Tensor | slice) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def build_plan(table: SegmentTable, device: torch.device) -> SdpaPlan:
    """Sort a table's segments into buckets and place the index tensors on ``device``."""
    q_len, k_len = (table.rows[:, b] - table.rows[:, a] for a, b in ((0, 1), (2, 3)))
    buckets: list[Bucket] = []
    output_rows = np.empty(table.length, dtype=np.int64)
    done = 0
    for members in _group(q_len, k_len, table.causal):
        bucket, q_rows, valid = _build_bucket(table, members, device)
        output_rows[q_rows[valid]] = done + np.flatnonzero(valid)
        buckets.append(bucket)
        done += len(q_rows)
    in_order = done == table.length and np.array_equal(output_rows, np.arange(table.length))
    return SdpaPlan(tuple(buckets), None if in_order else torch.from_numpy(output_rows).to(device))


def _build_bucket(table: SegmentTable, members: np.ndarray, device: torch.device):
    rows = table.rows[members]
    q_rows, q_valid = _padded_rows(rows[:, 0], rows[:, 1])
    k_rows, k_valid = _padded_rows(rows[:, 2], rows[:, 3])
    causal = bool(table.causal[members[0]])
    # Under a causal mask padding keys lie after every real query: no mask is needed.
    key_mask = None
    if not causal and not k_valid.all():
        key_mask = torch.from_numpy(k_valid[:, None, None, :]).to(device)
    bucket = Bucket(
        num=len(members),
        q_len=q_rows.shape[1],
        k_len=k_rows.shape[1],
        causal=causal,
        q_rows=_as_index(q_rows.ravel(), device),
        k_rows=_as_index(k_rows.ravel(), device),
        key_mask=key_mask,
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
    return torch.from_numpy(rows).to(device)


def _group(q_len: np.ndarray, k_len: np.ndarray, causal: np.ndarray) -> list[np.ndarray]:
    """Partition segments into buckets at the least cost of padded pairs plus calls.

    Single-row queries (bridges) and causal segments are kept apart; within each class, segments sorted by
    size are cut into runs by dynamic programming over the distinct sizes.
    """
    groups: list[np.ndarray] = []
    classes = causal.astype(np.int64) * 2 + (q_len == 1)
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        members = members[np.lexsort((members, q_len[members], k_len[members]))]
        shapes = np.stack([k_len[members], q_len[members]], axis=1)
        _, first, counts = np.unique(shapes, axis=0, return_index=True, return_counts=True)
        order = np.argsort(first)
        cuts = _cheapest_runs(shapes[first[order]], counts[order])
        edges = np.concatenate([[0], np.cumsum(counts[order])])
        groups += [np.sort(members[edges[a] : edges[b]]) for a, b in cuts]
    return groups


def _cheapest_runs(shapes: np.ndarray, counts: np.ndarray) -> list[tuple[int, int]]:
    """Cut distinct shapes (sorted by keys) into runs ``[a, b)`` that minimise padded pairs + CALL_COST per run."""
    m = len(shapes)
    best = np.full(m + 1, np.inf)
    best[0] = 0.0
    previous = np.zeros(m + 1, dtype=np.int64)
    for b in range(1, m + 1):
        a = np.arange(b)
        widest = np.maximum.accumulate(shapes[b - 1 :: -1, 1])[::-1]
        num = np.cumsum(counts[:b][::-1])[::-1]
        cost = best[a] + CALL_COST + num * shapes[b - 1, 0] * widest
        previous[b] = int(np.argmin(cost))
        best[b] = cost[previous[b]]
    runs, b = [], m
    while b:
        runs.append((int(previous[b]), b))
        b = int(previous[b])
    return runs[::-1]
