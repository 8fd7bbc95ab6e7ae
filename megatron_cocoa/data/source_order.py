"""The stream of samples whose steps each hold rows of one source only.

Negatives from the query's own data set are harder, and cannot be told apart by the task alone. A step then is a full
batch of one source. How many steps an epoch gives a source follows from its number of rows; what is left of it after
its last full step sits out the epoch. Each epoch draws anew which rows those are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from megatron_cocoa.data.corruption import seeded_generator
from megatron_cocoa.data.order import drawn_rows, in_rounds, numbered


class SourceOrder:
    """As ``SampleOrder``, an endless stream of rows that depends on the seed alone; a step never mixes sources.

    Args:
        sources: the source of each row.
        batch_size: positions of the stream in a step; the global batch.
        seed, stage: as in ``SampleOrder``.
        groups: one key per row; see ``SampleOrder``. Rounds are kept within each source.

    Raises:
        ValueError: for a source with fewer rows than a step needs: it would never be seen.
    """

    repeats_rows = False

    def __init__(
        self,
        sources: Sequence[str],
        *,
        batch_size: int,
        seed: int,
        stage: str,
        groups: Sequence[Hashable] | None = None,
    ) -> None:
        names = sorted(set(sources))
        by_name = {name: index for index, name in enumerate(names)}
        number = np.fromiter((by_name[name] for name in sources), dtype=np.int64, count=len(sources))
        self._rows = [np.flatnonzero(number == index) for index in range(len(names))]
        self._check(names, batch_size)
        self._source_of_row, self._names = number, names
        self._groups = None if groups is None else numbered(groups)
        self._seed, self._stage, self._batch_size = seed, stage, batch_size
        self.steps_per_epoch = sum(rows.size // batch_size for rows in self._rows)
        self._epoch_rows = lru_cache(maxsize=2)(self._draw)

    @property
    def identity(self) -> dict[str, int]:
        """What else than seed, stage and number of rows the stream depends on."""
        return {"per_source_batch_size": self._batch_size}

    def statistics(self) -> dict[str, int]:
        """``source/<name>``: rows of it that an epoch sees; ``left_out_per_epoch``: rows of all that it does not."""
        size = self._batch_size
        seen = {f"source/{name}": rows.size - rows.size % size for name, rows in zip(self._names, self._rows)}
        return {**seen, "left_out_per_epoch": len(self._source_of_row) - sum(seen.values())}

    def at(self, position: int) -> tuple[int, int]:
        """``(epoch, row)`` at a position of the stream; a step starts at a multiple of the batch size."""
        epoch, offset = divmod(position, self.steps_per_epoch * self._batch_size)
        return epoch, int(self._epoch_rows(epoch)[offset])

    def substitutes(self, position: int) -> Iterator[int]:
        """The rows that may replace an unusable one, best first, from the same source; see ``drawn_rows``."""
        _, row = self.at(position)
        rows = self._rows[self._source_of_row[row]]
        share = (position % self._batch_size, self._batch_size)
        drawn = drawn_rows(rows.size, key=(self._seed, self._stage, position), share=share)
        return (int(rows[index]) for index in drawn)

    def _check(self, names: list[str], batch_size: int) -> None:
        if names == [""]:
            raise ValueError(
                "contrastive.per_source_batches needs rows that name their source (column 'source'): none does"
            )
        small = {name or "(none)": rows.size for name, rows in zip(names, self._rows) if rows.size < batch_size}
        if small:
            raise ValueError(
                f"contrastive.per_source_batches: {len(small)} of {len(names)} sources have fewer rows than "
                f"contrastive.global_batch_size {batch_size} and would never be seen ({small}): lower it, or leave "
                f"their rows out"
            )

    def _draw(self, epoch: int) -> np.ndarray:
        steps: list[np.ndarray] = []
        for name, rows in zip(self._names, self._rows):
            order = rows[seeded_generator(self._seed, self._stage, epoch, "source", name).permutation(rows.size)]
            full = rows.size - rows.size % self._batch_size
            steps += list(in_rounds(order, self._groups)[:full].reshape(-1, self._batch_size))
        sequence = seeded_generator(self._seed, self._stage, epoch, "sources").permutation(len(steps))
        return np.concatenate([steps[index] for index in sequence])
