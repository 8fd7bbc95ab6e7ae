"""The global stream of samples: which row comes when, whatever the layout of the ranks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from megatron_cocoa.data.corruption import seeded_generator

MAX_SUBSTITUTES = 20
"""Rows that are tried for a place, its own among them, before the run ends."""

StepOf = Callable[[int], tuple[int, int]]
"""For a position of a stream the first position of its step, and the one past the last."""

_NO_ROWS = np.zeros(0, dtype=np.int64)


class SampleOrder:
    """An endless stream of rows: one permutation per epoch, drawn from (seed, stage, epoch).

    Position ``i`` of the stream lies in epoch ``i // num_rows``. A step takes the next ``global_batch_size``
    positions, a data-parallel rank a contiguous share of them: so the samples of a step do not depend on the layout.

    Args:
        num_rows: rows of the data set.
        seed: of the run.
        stage: so that stages do not share an order.
        groups: one key per row. Rows with equal keys are kept apart: an epoch goes in rounds, each of which holds at
            most one row of a group, so that (but for the step between two rounds) no step holds two of them.
        step_of: where given, no step holds a row twice, nor, with the exception above, two rows of a group: those of an
            epoch's first rows that the epoch before ends with in the same step come in the next step instead. No step
            may have more positions than there are rows.

    Raises:
        ValueError: if there are no rows.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        seed: int,
        stage: str,
        groups: Sequence[Hashable] | None = None,
        step_of: StepOf | None = None,
    ) -> None:
        if num_rows < 1:
            raise ValueError(f"stage {stage} has {num_rows} rows, needs 1 or more")
        assert groups is None or len(groups) == num_rows, num_rows
        self._groups = None if groups is None else numbered(groups)
        self.num_rows = num_rows
        self._seed = seed
        self._stage = stage
        self._step_of = step_of
        self._permutation = lru_cache(maxsize=2)(self._draw)
        self._heads: dict[int, np.ndarray] = {}

    @property
    def identity(self) -> dict[str, int]:
        """What else than seed, stage and number of rows the stream depends on."""
        return {}

    def statistics(self) -> dict[str, int]:
        """What the order leaves out; nothing here."""
        return {}

    @property
    def repeats_rows(self) -> bool:
        """Whether a step may hold a row twice."""
        return self._step_of is None

    def at(self, position: int) -> tuple[int, int]:
        """``(epoch, row)`` at a position of the stream."""
        epoch, offset = divmod(position, self.num_rows)
        head = self._head(epoch)
        return epoch, int(head[offset] if offset < head.size else self._permutation(epoch)[offset])

    def substitutes(self, position: int) -> Iterator[int]:
        """The rows that may replace an unusable one, best first: see ``drawn_rows``."""
        key = (self._seed, self._stage, position)
        if self._step_of is None:
            return drawn_rows(self.num_rows, key=key)
        first, end = self._step_of(position)
        return drawn_rows(self.num_rows, key=key, share=(position - first, end - first))

    def _head(self, epoch: int) -> np.ndarray:
        """The first rows of an epoch, as far as they are not those of its permutation."""
        if epoch not in self._heads:
            # An epoch's last rows depend on its head only where it is shorter than two steps: there, heads follow from
            # each other, at worst from the last epoch before that began with a step.
            needed = [epoch]
            while needed[-1] - 1 not in self._heads and self._ends_with_head(needed[-1] - 1):
                needed.append(needed[-1] - 1)
            for one in reversed(needed):
                self._heads[one] = self._draw_head(one)
            self._heads = {one: head for one, head in self._heads.items() if one >= epoch - 1}
        return self._heads[epoch]

    def _draw_head(self, epoch: int) -> np.ndarray:
        before, size = self._shared_step(epoch)
        if not before:
            return _NO_ROWS
        earlier, start = self._heads.get(epoch - 1, _NO_ROWS), self.num_rows - before
        ending = np.concatenate([earlier[start:], self._permutation(epoch - 1)[max(start, earlier.size) :]])
        head = self._permutation(epoch)[:size]
        # Of ``size`` rows at most ``before`` are among the others of the step, so that the rest of it finds its own.
        clash = np.isin(head, ending).astype(np.int64)
        if self._groups is not None:
            clash += np.isin(self._groups[head], self._groups[ending])
        return head[np.argsort(clash, kind="stable")]

    def _ends_with_head(self, epoch: int) -> bool:
        """Whether those of an epoch's rows that share a step with the next epoch depend on its head."""
        return self._shared_step(epoch)[1] > self.num_rows - self._shared_step(epoch + 1)[0]

    def _shared_step(self, epoch: int) -> tuple[int, int]:
        """Of the step that an epoch and the one before share: positions of that one, and all; zeros for none."""
        start = epoch * self.num_rows
        if self._step_of is None or epoch < 1:
            return 0, 0
        first, end = self._step_of(start)
        assert end - first <= self.num_rows, (first, end, self.num_rows)
        return (start - first, end - first) if first < start else (0, 0)

    def _draw(self, epoch: int) -> np.ndarray:
        order = seeded_generator(self._seed, self._stage, epoch, "order").permutation(self.num_rows)
        return in_rounds(order, self._groups)


def steps_of(batch_size: int) -> StepOf:
    """Steps of ``batch_size`` positions each."""

    def step_of(position: int) -> tuple[int, int]:
        first = position - position % batch_size
        return first, first + batch_size

    return step_of


def drawn_rows(num_rows: int, *, key: tuple[object, ...], share: tuple[int, int] | None = None) -> Iterator[int]:
    """Rows in place of an unusable one: ``MAX_SUBSTITUTES`` draws that depend on ``key`` alone.

    Args:
        num_rows: rows to draw from.
        key: names the place.
        share: ``(place, number of places)`` in the step, where the step may hold no row twice. Rows are dealt to its
            places in turn, and each draws from its own: which rank needs how many of them, no other rank knows. After
            the draws come all rows, for where a place has too few.
    """
    row = 0
    for attempt in range(MAX_SUBSTITUTES):
        row = int(seeded_generator(*key, attempt, "substitute").integers(num_rows))
        if share is not None:
            place, num_places = share
            own = row - row % num_places + place
            row = own if own < num_rows else place
        yield row
    if share is not None:
        yield from ((row + further) % num_rows for further in range(1, num_rows))


def numbered(keys: Iterable[Hashable]) -> np.ndarray:
    """Keys as numbers that are equal where they are, int64: an array of such as it is, else by first occurrence."""
    if isinstance(keys, np.ndarray) and keys.dtype == np.int64:
        return keys
    numbers: dict[Hashable, int] = {}
    return np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), dtype=np.int64)


def in_rounds(order: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """``order``, rearranged as little as it takes that each round holds at most one row of a group."""
    return order if groups is None else order[np.argsort(_rounds(groups[order]), kind="stable")]


def _rounds(groups: np.ndarray) -> np.ndarray:
    """For each element how many equal ones come before it."""
    by_group = np.argsort(groups, kind="stable")
    first = np.searchsorted(groups[by_group], groups[by_group], side="left")
    rounds = np.empty(groups.size, dtype=np.int64)
    rounds[by_group] = np.arange(groups.size) - first
    return rounds
