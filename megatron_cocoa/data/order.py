"""The global stream of samples: which row comes when, whatever the layout of the ranks."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache

import numpy as np

from megatron_cocoa.data.corruption import seeded_generator


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

    Raises:
        ValueError: if there are no rows.
    """

    def __init__(self, num_rows: int, *, seed: int, stage: str, groups: Sequence[Hashable] | None = None) -> None:
        if num_rows < 1:
            raise ValueError(f"stage {stage} has {num_rows} rows, needs 1 or more")
        assert groups is None or len(groups) == num_rows, num_rows
        self._groups = None if groups is None else numbered(groups)
        self.num_rows = num_rows
        self._seed = seed
        self._stage = stage
        self._permutation = lru_cache(maxsize=2)(self._draw)

    @property
    def identity(self) -> dict[str, int]:
        """What else than seed, stage and number of rows the stream depends on."""
        return {}

    def statistics(self) -> dict[str, int]:
        """What the order leaves out; nothing here."""
        return {}

    def at(self, position: int) -> tuple[int, int]:
        """``(epoch, row)`` at a position of the stream."""
        epoch, offset = divmod(position, self.num_rows)
        return epoch, int(self._permutation(epoch)[offset])

    def substitute(self, position: int, attempt: int) -> int:
        """The row that replaces an unusable one: a draw that depends on the position and the attempt alone."""
        key = (self._seed, self._stage, position, attempt, "substitute")
        return int(seeded_generator(*key).integers(self.num_rows))

    def _draw(self, epoch: int) -> np.ndarray:
        order = seeded_generator(self._seed, self._stage, epoch, "order").permutation(self.num_rows)
        return in_rounds(order, self._groups)


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
