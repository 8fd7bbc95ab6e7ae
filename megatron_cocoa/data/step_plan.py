"""The plan of a step: which rows, in which packs, on which rank; and its execution, one pack at a time.

Every rank computes the same plan from the rows and the pictures' headers, and executes its own part of it. What turns
out to be unusable is replaced: by the header when the plan is made, by decoding when the pack is.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from megatron_cocoa.batch import PackedBatch
from megatron_cocoa.data.collate import PackOptions
from megatron_cocoa.data.cost import CostModel
from megatron_cocoa.data.decode import PictureError
from megatron_cocoa.data.order import MAX_SUBSTITUTES
from megatron_cocoa.data.packing import assign_samples
from megatron_cocoa.data.prepared import PreparedSample
from megatron_cocoa.data.samples import SampleBuilder
from megatron_cocoa.data.stages import Order, StageData


@dataclass(frozen=True)
class PlannedRow:
    """A place of the global stream and the row that fills it.

    Args:
        place: position in the stream.
        epoch, row: what stands there.
        tokens: of all samples of the row together.
        cost: in FLOPs.
        skipped: rows that were tried for the place before, and why they were not taken.
    """

    place: int
    epoch: int
    row: int
    tokens: int
    cost: float
    skipped: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class PackPlan:
    """One pack of this rank.

    Args:
        step: position of the step in the stream.
        index, count: which of the step's packs on this rank, and how many there are.
        rows: in order.
        taken: rows of the whole step: a substitute is not one of them if that can be helped, and never where a step
            may hold no row twice.
        rank_imbalance, pack_imbalance: of the whole step, see ``packing.Assignment``.
        digest: of the whole step: which row stands at which place, and in which pack of which rank; 63 bits.
    """

    step: int
    index: int
    count: int
    rows: tuple[PlannedRow, ...]
    taken: frozenset[int]
    rank_imbalance: float
    pack_imbalance: float
    digest: int


@dataclass(frozen=True)
class StepShape:
    """How a step is divided.

    Args:
        global_batch_size: rows of a step.
        rank, num_ranks: this data-parallel rank, and of how many.
        samples_per_pack: without a budget.
        budget: tokens that a pack may hold, or None.
        packs_multiple_of: with a budget, packs of a rank come in multiples of this.
    """

    global_batch_size: int
    rank: int
    num_ranks: int
    samples_per_pack: int
    budget: int | None = None
    packs_multiple_of: int = 1


class StepPlanner:
    """Plans steps, and executes the packs of one rank.

    Args:
        data: the stage's rows and rules.
        order: which row comes when.
        builder: prepares samples.
        options: how packs are filled.
        cost: what samples cost.
        shape: how a step is divided.
        defers_all: where ``options`` defer floats, leave those of a step's first pack, too, to be made later: else
            they are made with the pack, so that the step can start with it.
    """

    def __init__(
        self,
        data: StageData,
        order: Order,
        *,
        builder: SampleBuilder,
        options: PackOptions,
        cost: CostModel,
        shape: StepShape,
        defers_all: bool = False,
    ) -> None:
        self.shape = shape
        self._defers_all = defers_all
        self._data, self._order = data, order
        self._builder, self._options, self._cost = builder, options, cost

    def plan(self, step: int) -> list[PackPlan]:
        """This rank's packs of the step at position ``step``.

        Raises:
            ValueError: if too many rows one after the other are unusable, or a sample exceeds the budget.
        """
        shape = self.shape
        places = range(step, step + shape.global_batch_size)
        taken = {self._order.at(place)[1] for place in places}
        rows: list[PlannedRow] = []
        for place in places:
            rows.append(self._planned(place, taken))
            taken.add(rows[-1].row)
        found = assign_samples(
            [row.tokens for row in rows],
            [row.cost for row in rows],
            num_ranks=shape.num_ranks,
            samples_per_pack=shape.samples_per_pack,
            budget=shape.budget,
            packs_multiple_of=shape.packs_multiple_of,
        )
        own, digest = found.packs[shape.rank], _digest(rows, found.packs)
        all_taken = frozenset(taken)
        return [
            PackPlan(
                step=step,
                index=index,
                count=len(own),
                rows=tuple(rows[i] for i in pack),
                taken=all_taken,
                rank_imbalance=found.rank_imbalance,
                pack_imbalance=found.pack_imbalance,
                digest=digest,
            )
            for index, pack in enumerate(own)
        ]

    def execute(self, plan: PackPlan) -> tuple[PackedBatch, Counter]:
        """Decode and pack; with what was counted on the way.

        Raises:
            ValueError: if too many rows one after the other have unusable pictures.
        """
        counts: Counter = Counter()
        samples: list[PreparedSample] = []
        decoded = self._builder.pictures.num_decoded
        room = None if self.shape.budget is None else self.shape.budget - sum(row.tokens for row in plan.rows)
        taken = set(plan.taken)
        for row in plan.rows:
            limit = None if room is None else room + row.tokens
            found = self._prepare(row, plan.step, taken, limit, counts)
            samples += found
            room = None if limit is None else limit - _tokens(found)
        _count(samples, counts)
        counts["decoded"] = self._builder.pictures.num_decoded - decoded
        batch = self._data.collate(samples, self._options)
        return batch if plan.index or self._defers_all else batch.materialized(), counts

    def _planned(self, place: int, taken: Set[int]) -> PlannedRow:
        skipped: list[tuple[int, str]] = []
        for epoch, row in self._candidates(place, taken):
            try:
                sizes = self._data.measure(self._data.row_set.rows[row], self._builder, epoch=epoch)
            except PictureError as error:
                skipped.append((row, error.reason))
                last = error
                continue
            tokens, cost = sum(size.tokens for size in sizes), sum(map(self._cost.flops, sizes))
            return PlannedRow(place, epoch, row, tokens, cost, tuple(skipped))
        raise self._given_up(place, len(skipped), last)

    def _prepare(
        self, planned: PlannedRow, step: int, taken: set[int], limit: int | None, counts: Counter
    ) -> list[PreparedSample]:
        """The samples of a place; ``limit`` is how many tokens its pack has left for a substitute."""
        counts["rows"] += 1
        counts.update(f"skipped/{reason}" for _, reason in planned.skipped)
        tried = {row for row, _ in planned.skipped}
        last: Exception | None = None
        found: list[tuple[int, list[PreparedSample]]] = []
        # Substitutes are drawn only where the first cannot be used.
        for epoch, row in chain([(planned.epoch, planned.row)], self._candidates(planned.place, taken)):
            if row in tried:
                continue
            tried.add(row)
            try:
                samples = self._data.prepare(self._data.row_set.rows[row], self._builder, epoch=epoch, step=step)
            except PictureError as error:
                counts[f"skipped/{error.reason}"] += 1
                last = error
                continue
            found.append((row, samples))
            if row == planned.row or limit is None or _tokens(samples) <= limit:
                break
        if not found:
            raise self._given_up(planned.place, len(tried), last)
        # Where no substitute fits, the shortest: the pack is then a little longer than its budget.
        row, samples = min(found, key=lambda one: _tokens(one[1]))
        if not self._order.repeats_rows:
            taken.add(row)
        return samples

    def _candidates(self, place: int, taken: Set[int]) -> Iterator[tuple[int, int]]:
        """``(epoch, row)``: the row of ``place``, then substitutes; those that the step has already last, or never."""
        epoch, row = self._order.at(place)
        yield epoch, row
        rows: Iterable[int] = self._order.substitutes(place)
        if self._order.repeats_rows:
            rows = sorted(islice(rows, MAX_SUBSTITUTES - 1), key=taken.__contains__)
        else:
            rows = islice(_new(rows, taken), MAX_SUBSTITUTES - 1)
        yield from ((epoch, row) for row in rows)

    def _given_up(self, place: int, tried: int, last: Exception) -> ValueError:
        none_left = ""
        if tried < MAX_SUBSTITUTES and not self._order.repeats_rows:
            none_left = ", and the step, which may hold no row twice, has all others of their source"
        return ValueError(
            f"{tried} rows one after the other have unusable pictures (position {place} of the stream){none_left}: "
            f"check that the data folder holds the pictures; the last error was: {last}"
        )


def _digest(rows: Sequence[PlannedRow], packs: Sequence[Sequence[Sequence[int]]]) -> int:
    """What ``PackPlan.digest`` says of a step's rows and of the packs of each rank."""
    placed = [
        (rank, number, rows[index].place, rows[index].row)
        for rank, own in enumerate(packs)
        for number, pack in enumerate(own)
        for index in pack
    ]
    found = hashlib.blake2b(np.array(placed, dtype="<i8").tobytes(), digest_size=8)
    return int.from_bytes(found.digest(), "little") >> 1


def _new(rows: Iterable[int], taken: Set[int]) -> Iterator[int]:
    """Those of ``rows`` that are not ``taken``, each once."""
    seen = set(taken)
    for row in rows:
        if row not in seen:
            seen.add(row)
            yield row


def _tokens(samples: list[PreparedSample]) -> int:
    return sum(sample.input_ids.size for sample in samples)


def _count(samples: list[PreparedSample], counts: Counter) -> None:
    for sample in samples:
        counts["samples"] += 1
        counts["tokens"] += sample.input_ids.size
        counts["cut_tokens"] += sample.num_cut
        counts["text_eligible"] += sample.num_eligible
        counts["text_masked"] += sample.text_rows.size
        counts["unit_masked"] += sample.masked_units.size
        counts["unit_eligible"] += sample.feature_rows.size
