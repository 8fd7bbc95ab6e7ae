"""Mask kinds as variable-length segments: no dense mask anywhere.

Every mask that this project trains with gives each query row one contiguous run of key rows. So a packed batch
is a short table of *segments*, ``queries [q_start, q_end) attend to keys [k_start, k_end)``, whose query ranges
tile the pack. A plain flash kernel serves each segment; the collaborative mask of CoCoA (arXiv 2603.01471) is
three of them and costs a^2 + b^2 + n instead of n^2. Adding a mask kind means adding its segments to
``SEGMENT_RULES``, nothing else: every backend reads the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_cocoa.batch import MaskKind

Rows = list[tuple[int, int, int, int, bool]]
"""Segments as ``(q_start, q_end, k_start, k_end, causal)``."""


def _causal(start: int, end: int, bridge: int | None) -> Rows:
    return [(start, end, start, end, True)]


def _bidirectional(start: int, end: int, bridge: int | None) -> Rows:
    return [(start, end, start, end, False)]


def _eos_bridged(start: int, end: int, bridge: int) -> Rows:
    return [
        (start, bridge, start, bridge + 1, False),
        (bridge, bridge + 1, start, end, False),
        (bridge + 1, end, bridge, end, False),
    ]


def _eos_bridged_strict(start: int, end: int, bridge: int) -> Rows:
    return [(start, bridge + 1, start, bridge + 1, False), (bridge + 1, end, bridge, end, False)]


SEGMENT_RULES: dict[MaskKind, Callable[[int, int, int | None], Rows]] = {
    MaskKind.CAUSAL: _causal,
    MaskKind.BIDIRECTIONAL: _bidirectional,
    MaskKind.EOS_BRIDGED: _eos_bridged,
    MaskKind.EOS_BRIDGED_STRICT: _eos_bridged_strict,
}
"""For a sample at rows ``[start, end)`` with its bridge's row, the segments of each kind; empty ones are dropped."""


@dataclass(frozen=True, eq=False)
class SegmentTable:
    """The attention of one packed sequence of ``length`` rows.

    rows:   int64 numpy ``(segments, 4)``: q_start, q_end, k_start, k_end, sorted by q_start.
    causal: bool numpy ``(segments,)``: within the segment, query ``q_start + i`` sees keys up to ``k_start + i``.
    plans:  what a backend prepared for this table (index tensors on the device), by backend name: built at the
            first layer, shared by all others.
    """

    length: int
    rows: np.ndarray
    causal: np.ndarray
    plans: dict = field(default_factory=dict, repr=False)

    @classmethod
    def from_rows(cls, length: int, rows: Rows) -> SegmentTable:
        """Build and check a table.

        Raises:
            ValueError: if the query ranges do not tile ``[0, length)``, if keys lie outside of it, if a segment
                has queries but no keys, or if a causal segment is not square.
        """
        kept = [row for row in rows if row[1] > row[0]]
        table = np.array([row[:4] for row in kept], dtype=np.int64).reshape(-1, 4)
        causal = np.array([row[4] for row in kept], dtype=bool)
        order = np.argsort(table[:, 0], kind="stable")
        table, causal = table[order], causal[order]
        edges = np.concatenate([[0], table[:, 1]])
        if edges[-1] != length or not np.array_equal(edges[:-1], table[:, 0]):
            raise ValueError(
                f"the segments' query ranges {table[:, :2].tolist()} do not cover each of {length} rows once"
            )
        if len(table) and (table[:, 2].min() < 0 or table[:, 3].max() > length):
            raise ValueError(f"segments refer to key rows outside of [0, {length}): {table.tolist()}")
        if (table[:, 3] <= table[:, 2]).any():
            raise ValueError(f"a segment has queries but no keys to attend to: {table.tolist()}")
        if ((table[:, 1] - table[:, 0]) != (table[:, 3] - table[:, 2]))[causal].any():
            raise ValueError(f"a causal segment needs as many keys as queries: {table[causal].tolist()}")
        return cls(length, table, causal)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], *, causal: bool = False) -> SegmentTable:
        """Blocks that attend within themselves: images, windows, plain packed samples."""
        edges = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        square = np.stack([edges[:-1], edges[1:], edges[:-1], edges[1:]], axis=1)
        return cls(int(edges[-1]), square, np.full(len(square), causal))

    def key_ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """The mask row by row: query ``i`` sees keys ``[low[i], high[i])``; int64 numpy ``(length,)`` each."""
        sizes = self.rows[:, 1] - self.rows[:, 0]
        q_start, low, high = (np.repeat(self.rows[:, column], sizes) for column in (0, 2, 3))
        row_in_segment = np.arange(self.length) - q_start
        return low, np.where(np.repeat(self.causal, sizes), low + row_in_segment + 1, high)

    def num_score_entries(self) -> int:
        """Query-key pairs that are computed: what attention costs, for FLOP counts and balance."""
        sizes, keys = self.rows[:, 1] - self.rows[:, 0], self.rows[:, 3] - self.rows[:, 2]
        return int(np.where(self.causal, sizes * (sizes + 1) // 2, sizes * keys).sum())


def compile_segments(
    kind: MaskKind,
    sample_lengths: Sequence[int],
    bridge_positions: Sequence[int | None] = (),
    tail_length: int = 0,
) -> SegmentTable:
    """Segments of a packed batch.

    Args:
        kind: the mask of every sample in the pack.
        sample_lengths: tokens of each sample in pack order.
        bridge_positions: global row of each sample's bridge; may be empty for kinds that need none.
        tail_length: rows after the last sample; they attend to each other only.

    Raises:
        ValueError: if a bridge is missing or lies outside of its sample.
    """
    rule = SEGMENT_RULES[kind]
    bridges = list(bridge_positions) or [None] * len(sample_lengths)
    if len(bridges) != len(sample_lengths):
        raise ValueError(f"{len(bridges)} bridge positions for {len(sample_lengths)} samples")
    rows: Rows = []
    start = 0
    for index, (length, bridge) in enumerate(zip(sample_lengths, bridges)):
        end = start + length
        if kind.needs_bridge and (bridge is None or not start <= bridge < end):
            raise ValueError(
                f"mask kind {kind.value} needs one bridge in each sample: sample {index} spans rows [{start}, {end}), "
                f"its bridge is {bridge}"
            )
        rows += rule(start, end, bridge)
        start = end
    if tail_length:
        rows.append((start, start + tail_length, start, start + tail_length, False))
    return SegmentTable.from_rows(start + tail_length, rows)
