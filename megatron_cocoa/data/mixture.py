"""Several sources in one endless stream, by weight, without any state but the position.

The stream goes in blocks. How many rows of a source the first ``b`` blocks hold follows from the weights alone (rounded
once, so that shares never drift), and in a block the sources are shuffled. So any position can be found at once,
on any number of ranks, and a run that stops anywhere goes on exactly there.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache, partial

import numpy as np

from megatron_cocoa.data.corruption import seeded_generator
from megatron_cocoa.data.order import SampleOrder, steps_of
from megatron_cocoa.data.rows import RowSet

BLOCK = 4096
"""Positions of a block, at least: over every aligned block, shares are exact to one row."""


def stream_of(
    row_set: RowSet,
    *,
    seed: int,
    stage: str,
    groups: Sequence[Hashable] | None = None,
    batch_size: int | None = None,
) -> SampleOrder | MixedOrder:
    """All rows once an epoch, or where their sources have weights, by these.

    Args:
        row_set, seed, stage, groups: as of the two classes.
        batch_size: of steps that may hold no row twice.
    """
    if any(weight is not None for _, _, weight in row_set.parts):
        return MixedOrder(row_set.parts, seed=seed, stage=stage, groups=groups, batch_size=batch_size)
    step_of = None if batch_size is None else steps_of(batch_size)
    return SampleOrder(len(row_set.rows), seed=seed, stage=stage, groups=groups, step_of=step_of)


class MixedOrder:
    """``SampleOrder`` over sources with weights: each source is a stream of its own permutations.

    Args:
        parts: ``(name, number of rows, weight)`` of each source, in the order of the rows.
        seed: of the run.
        stage: so that stages do not share an order.
        groups: as for ``SampleOrder``; rows are kept apart within their source.
        batch_size: of steps that may hold no row twice: each then holds its share of a block, and the blocks whole
            steps. None leaves it to chance how a block's sources fall into steps.

    Raises:
        ValueError: if a weight is so small that a block would not hold a single row of its source, or with
            ``batch_size`` so large that a step would hold more rows of its source than there are.
    """

    def __init__(
        self,
        parts: Sequence[tuple[str, int, float]],
        *,
        seed: int,
        stage: str,
        groups: Sequence[Hashable] | None = None,
        batch_size: int | None = None,
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
        self._steps = 1 if batch_size is None else -(-BLOCK // batch_size)
        self._size = BLOCK if batch_size is None else self._steps * batch_size
        if batch_size is not None:
            self._check_rows(stage, batch_size)
        self.repeats_rows = batch_size is None
        self._orders = [
            SampleOrder(
                rows,
                seed=seed,
                stage=f"{stage}:{name}",
                groups=None if groups is None else groups[start : start + rows],
                step_of=None if batch_size is None else partial(self._step_of, source),
            )
            for source, ((name, rows, _), start) in enumerate(zip(parts, self._starts))
        ]
        self._seed, self._stage = seed, stage
        self._block = lru_cache(maxsize=4)(self._draw_block)
        # Exact products of fractions, as many as there are sources, where a step asks for each of its places twice.
        self._before = lru_cache(maxsize=256)(self._count_before)

    @property
    def identity(self) -> dict[str, list]:
        """What else than seed, stage and number of rows the stream depends on."""
        return {"sources": [list(part) for part in self._parts]}

    def statistics(self) -> dict[str, int]:
        """What the order leaves out; nothing here."""
        return {}

    def at(self, position: int) -> tuple[int, int]:
        """``(epoch of its source, row)`` at a position of the stream."""
        source, place = self._place(position)
        epoch, row = self._orders[source].at(place)
        return epoch, self._starts[source] + row

    def substitutes(self, position: int) -> Iterator[int]:
        """The rows that may replace an unusable one, best first, from the same source; see ``drawn_rows``."""
        source, place = self._place(position)
        rows = self._orders[source].substitutes(position if self.repeats_rows else place)
        return (self._starts[source] + row for row in rows)

    def _place(self, position: int) -> tuple[int, int]:
        """The source that a position belongs to, and the position in its stream."""
        block, offset = divmod(position, self._size)
        sources, counts = self._block(block)
        source = int(sources[offset])
        return source, self._before(block)[source] + int(counts[offset])

    def _step_of(self, source: int, place: int) -> tuple[int, int]:
        """What the step that holds ``place`` of a source's stream takes of it: the first place, and the one past."""
        share = self._ends[source] - (self._ends[source - 1] if source else 0)
        # Blocks hold the share to one row: those before this number of blocks are more than ``place``.
        blocks = range(int((place + 1) / (share * self._size)) + 2)
        block = bisect_right(blocks, place, key=lambda block: self._before(block)[source]) - 1
        held = (self._block(block)[0].reshape(self._steps, -1) == source).sum(axis=1)
        ends = self._before(block)[source] + np.cumsum(held)
        step = int(np.searchsorted(ends, place, side="right"))
        return int(ends[step] - held[step]), int(ends[step])

    def _check_rows(self, stage: str, batch_size: int) -> None:
        for (name, rows, weight), start, end in zip(self._parts, [Fraction(), *self._ends], self._ends):
            in_block = math.ceil(end * self._size) - math.floor(start * self._size)
            in_step = -(-in_block // self._steps)
            if in_step > rows:
                raise ValueError(
                    f"stage {stage}: source {name} has {rows} rows, and by its weight {weight:g} a step of "
                    f"{batch_size} holds up to {in_step} of them: a pair that occurs twice in a step is its own "
                    f"negative; lower its weight or {stage}.global_batch_size"
                )

    def _count_before(self, block: int) -> tuple[int, ...]:
        """Rows of each source in the blocks before ``block``."""
        reached = [int(end * block * self._size) for end in self._ends]
        return tuple(after - before for after, before in zip(reached, [0, *reached]))

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each position of the block its source, and how many of that source precede it in the block."""
        held = np.subtract(self._before(block + 1), self._before(block))
        sources = np.repeat(np.arange(held.size), held)
        generator = seeded_generator(self._seed, self._stage, block, "mixture")
        if self.repeats_rows:
            sources = sources[generator.permutation(sources.size)]
        else:
            dealt = sources.reshape(-1, self._steps).T
            sources = generator.permuted(dealt[generator.permutation(self._steps)], axis=1).ravel()
        counts = np.empty(sources.size, dtype=np.int64)
        for source in range(held.size):
            places = np.flatnonzero(sources == source)
            counts[places] = np.arange(places.size)
        return sources, counts
