"""Several sources in one endless stream, by weight, without any state but the position.

The stream goes in blocks. How many rows of a source the first ``b`` blocks hold follows from the weights alone (rounded
once, so that shares never drift), and in a block the sources are shuffled. So any position can be found at once,
on any number of ranks, and a run that stops anywhere goes on exactly there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from megatron_cocoa.data.corruption import seeded_generator
from megatron_cocoa.data.order import SampleOrder
from megatron_cocoa.data.rows import RowSet

BLOCK = 4096
"""Positions of a block: over every aligned block, shares are exact to one row."""


def stream_of(
    row_set: RowSet, *, seed: int, stage: str, groups: Sequence[Hashable] | None = None
) -> SampleOrder | MixedOrder:
    """All rows once an epoch, or where their sources have weights, by these; arguments as of the two classes."""
    if any(weight is not None for _, _, weight in row_set.parts):
        return MixedOrder(row_set.parts, seed=seed, stage=stage, groups=groups)
    return SampleOrder(len(row_set.rows), seed=seed, stage=stage, groups=groups)


class MixedOrder:
    """``SampleOrder`` over sources with weights: each source is a stream of its own permutations.

    Args:
        parts: ``(name, number of rows, weight)`` of each source, in the order of the rows.
        seed: of the run.
        stage: so that stages do not share an order.
        groups: as for ``SampleOrder``; rows are kept apart within their source.

    Raises:
        ValueError: if a weight is so small that a block would not hold a single row of its source.
    """

    def __init__(
        self,
        parts: Sequence[tuple[str, int, float]],
        *,
        seed: int,
        stage: str,
        groups: Sequence[Hashable] | None = None,
    ) -> None:
        total = sum(Fraction(weight) for _, _, weight in parts)
        shares = [Fraction(weight) / total for _, _, weight in parts]
        small = [name for (name, _, _), share in zip(parts, shares) if share * BLOCK < 1]
        if small:
            raise ValueError(
                f"stage {stage}: the sources {small} would get less than one in {BLOCK} samples: raise their weight, "
                f"or leave them out"
            )
        self.num_rows = sum(rows for _, rows, _ in parts)
        self._parts = tuple(parts)
        self._ends = [sum(shares[: i + 1], Fraction()) for i in range(len(shares))]
        self._starts = np.cumsum([0] + [rows for _, rows, _ in parts]).tolist()
        self._orders = [
            SampleOrder(
                rows,
                seed=seed,
                stage=f"{stage}:{name}",
                groups=None if groups is None else groups[start : start + rows],
            )
            for (name, rows, _), start in zip(parts, self._starts)
        ]
        self._seed, self._stage = seed, stage
        self._block = lru_cache(maxsize=4)(self._draw_block)

    @property
    def identity(self) -> dict[str, list]:
        """What else than seed, stage and number of rows the stream depends on."""
        return {"sources": [list(part) for part in self._parts]}

    def statistics(self) -> dict[str, int]:
        """What the order leaves out; nothing here."""
        return {}

    def at(self, position: int) -> tuple[int, int]:
        """``(epoch of its source, row)`` at a position of the stream."""
        block, offset = divmod(position, BLOCK)
        sources, counts = self._block(block)
        source = int(sources[offset])
        epoch, row = self._orders[source].at(self._before(block)[source] + int(counts[offset]))
        return epoch, self._starts[source] + row

    def substitute(self, position: int, attempt: int) -> int:
        """The row that replaces an unusable one, from the same source."""
        block, offset = divmod(position, BLOCK)
        source = int(self._block(block)[0][offset])
        return self._starts[source] + self._orders[source].substitute(position, attempt)

    def _before(self, block: int) -> list[int]:
        """Rows of each source in the blocks before ``block``."""
        reached = [int(end * block * BLOCK) for end in self._ends]
        return [after - before for after, before in zip(reached, [0, *reached])]

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each position of the block its source, and how many of that source precede it in the block."""
        held = np.subtract(self._before(block + 1), self._before(block))
        sources = np.repeat(np.arange(held.size), held)
        sources = sources[seeded_generator(self._seed, self._stage, block, "mixture").permutation(sources.size)]
        counts = np.empty(sources.size, dtype=np.int64)
        for source in range(held.size):
            places = np.flatnonzero(sources == source)
            counts[places] = np.arange(places.size)
        return sources, counts
