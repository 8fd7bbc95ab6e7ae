"""Segments as calls of a variable-length kernel; ``varlen_kernels`` has the kernels.

Query segments tile the pack, so queries go in as they are. Key segments of the collaborative mask overlap at the
bridge: then keys and values are gathered to one row per segment member (about 2 n rows) for a single call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_cocoa.model.segments import SegmentTable
from megatron_cocoa.parallel.device import upload


@dataclass(frozen=True)
class VarlenCall:
    """One kernel call: query rows ``[q_start, q_end)`` of the pack, as consecutive segments.

    k_rows: rows of the pack that form the key sequence, in segment order; a slice where they are contiguous.
    cu_q, cu_k: int32 ``(segments + 1,)`` offsets on the device.
    same_lengths: each segment has as many queries as keys.
    """

    q_rows: slice
    k_rows: Tensor | slice
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool
    same_lengths: bool


def build_calls(table: SegmentTable, device: torch.device) -> tuple[VarlenCall, ...]:
    """One call per run of segments that agree on causality; almost always a single one."""
    edges = np.flatnonzero(np.diff(table.causal.astype(np.int8))) + 1
    calls = []
    for members in np.split(np.arange(len(table.rows)), edges):
        rows = table.rows[members]
        q_len, k_len = rows[:, 1] - rows[:, 0], rows[:, 3] - rows[:, 2]
        same_lengths = np.array_equal(q_len, k_len)
        cu_q = upload(_offsets(q_len).astype(np.int32), device)
        calls.append(
            VarlenCall(
                q_rows=slice(int(rows[0, 0]), int(rows[-1, 1])),
                k_rows=_key_rows(rows[:, 2], rows[:, 3], device),
                cu_q=cu_q,
                cu_k=cu_q if same_lengths else upload(_offsets(k_len).astype(np.int32), device),
                max_q=int(q_len.max()),
                max_k=int(k_len.max()),
                causal=bool(table.causal[members[0]]),
                same_lengths=same_lengths,
            )
        )
    return tuple(calls)


def _key_rows(starts: np.ndarray, ends: np.ndarray, device: torch.device) -> Tensor | slice:
    if np.array_equal(starts[1:], ends[:-1]):
        return slice(int(starts[0]), int(ends[-1]))
    offsets = _offsets(ends - starts)
    return upload(np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], ends - starts), device)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def attend_with(
    kernel: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, table: SegmentTable, scale: float
) -> Tensor:
    """Run ``kernel(query, key, value, call, scale)`` over a table's calls; shapes as in ``sdpa.attend``."""
    calls = table.plans.get("varlen")
    if calls is None:
        calls = table.plans["varlen"] = build_calls(table, query.device)
    outputs = []
    for call in calls:
        k, v = (_pick(x, call.k_rows) for x in (key, value))
        outputs.append(kernel(_pick(query, call.q_rows), k, v, call, scale))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _pick(x: Tensor, rows: Tensor | slice) -> Tensor:
    if not isinstance(rows, slice):
        return x.index_select(0, rows)
    # A slice of all rows would still copy its gradient into one of zeros.
    return x if rows == slice(0, len(x)) else x[rows]
