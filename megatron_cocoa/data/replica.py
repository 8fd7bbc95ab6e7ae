"""One reader a replica: pictures are decoded once, whatever the tensor, context and pipeline parallel degrees."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from megatron_cocoa.batch import PackedBatch
from megatron_cocoa.data.deferred import DeferredFloats
from megatron_cocoa.data.loader import StageLoader
from megatron_cocoa.parallel.replica import ReplicaLink


@dataclass(frozen=True)
class _Handed:
    """What crosses a replica with each step, but for pictures.

    Args:
        batches: all of whose floats are deferred, and whose deferred parts hold no pictures.
        state, statistics, plan_digest: of the reader after the step.
        error: why the reader could not go on.
    """

    batches: tuple[PackedBatch, ...] = ()
    state: dict | None = None
    statistics: dict[str, float] | None = None
    plan_digest: int = 0
    error: str | None = None


class ReplicaLoader:
    """``StageLoader`` for a rank of a model-parallel replica: the same face, the same batches, one reader.

    Every rank of the world must build it at the same time, and the ranks of a replica must call its methods together.
    Pictures cross as the 8-bit ones that floats are made of, to the ranks that make some.

    Args:
        make_reader: builds the reader with everything that any rank of the replica needs, and ``defers_all``; called
            on one rank of it.
        link: to the other ranks of the replica.
        needs_pixels, needs_unit_targets: of this rank, see ``PackOptions``.
        ahead: hand over the next step in a thread during the present one.

    Raises:
        ValueError: on every rank of the replica, whatever ``make_reader`` raises on the one that reads.
    """

    def __init__(
        self,
        make_reader: Callable[[], StageLoader],
        link: ReplicaLink,
        *,
        needs_pixels: bool,
        needs_unit_targets: bool,
        ahead: bool,
    ) -> None:
        self._link = link
        self._needs_pixels, self._needs_unit_targets = needs_pixels, needs_unit_targets
        self._reader: StageLoader | None = None
        self._executor = ThreadPoolExecutor(1, "replica-loader") if ahead else None
        self._next: Future[_Handed] | None = None
        self._latest = self._first(make_reader)

    def next_step(self) -> list[PackedBatch]:
        """This replica's micro-batches of the next optimizer step, on the CPU, with what this rank needs of them.

        As of ``StageLoader``, only the first holds its floats.

        Raises:
            ValueError: as ``StageLoader.next_step``, on every rank of the replica.
        """
        waiting, self._next = self._next, None
        handed = self._exchange() if waiting is None else waiting.result()
        _raise_error(handed)
        self._latest = handed
        if self._executor is not None:
            self._next = self._executor.submit(self._exchange)
        return list(handed.batches)

    def state_dict(self) -> dict:
        """As ``StageLoader.state_dict``."""
        return dict(self._latest.state)

    def load_state_dict(self, state: dict) -> None:
        """As ``StageLoader.load_state_dict``; every rank of the replica must call it.

        Raises:
            ValueError: on every rank of the replica.
        """
        self._settle()

        def loaded() -> StageLoader:
            self._reader.load_state_dict(state)
            return self._reader

        self._latest = self._first(loaded)

    def statistics(self) -> dict[str, float]:
        """The reader's, as of the last step."""
        return dict(self._latest.statistics)

    def num_skipped(self) -> int:
        """As ``StageLoader.num_skipped``, as of the last step."""
        return int(sum(n for name, n in self._latest.statistics.items() if name.startswith("skipped/")))

    def plan_digest(self) -> int:
        """As ``StageLoader.plan_digest``."""
        return self._latest.plan_digest

    def close(self) -> None:
        """End the thread and the reader's processes. Safe to call twice."""
        self._settle()
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None
        if self._reader is not None:
            self._reader.close()

    def _settle(self) -> None:
        """Let a hand-over that is under way end: the other ranks of the replica wait in it, too."""
        waiting, self._next = self._next, None
        if waiting is not None:
            waiting.exception()

    def _first(self, make_reader: Callable[[], StageLoader]) -> _Handed:
        handed = _Handed()
        if self._link.is_reader:
            try:
                self._reader = make_reader()
                handed = _Handed(state=self._reader.state_dict(), statistics=self._reader.statistics())
            except ValueError as error:
                handed = _Handed(error=str(error))
        handed = self._link.share(handed)
        _raise_error(handed)
        return handed

    def _exchange(self) -> _Handed:
        read: list[PackedBatch] = []
        handed = _Handed()
        if self._link.is_reader:
            read, handed = self._read()
        handed = self._link.share(handed)
        batches = tuple(
            self._complete(batch, read[index] if read else None) for index, batch in enumerate(handed.batches)
        )
        return replace(handed, batches=(*(batch.materialized() for batch in batches[:1]), *batches[1:]))

    def _read(self) -> tuple[list[PackedBatch], _Handed]:
        try:
            read = self._reader.next_step()
        except ValueError as error:
            return [], _Handed(error=str(error))
        return read, _Handed(
            batches=tuple(replace(b, deferred=replace(b.deferred, pictures=None)) for b in read),
            state=self._reader.state_dict(),
            statistics=self._reader.statistics(),
            plan_digest=self._reader.plan_digest(),
        )

    def _complete(self, batch: PackedBatch, read: PackedBatch | None) -> PackedBatch:
        """``batch`` with what this rank makes floats of; ``read`` is the reader's own."""
        made: DeferredFloats = batch.deferred
        own = None if read is None else read.deferred
        pictures = self._link.share_tensor(
            None if own is None else own.pictures,
            (made.picture_bytes,),
            torch.uint8,
            to="ends" if made.makes_targets else "tower",
        )
        made = replace(
            made,
            pictures=pictures,
            needs_pixels=self._needs_pixels,
            needs_unit_targets=self._needs_unit_targets,
        )
        return replace(batch, deferred=made)


def _raise_error(handed: _Handed) -> None:
    if handed.error is not None:
        raise ValueError(handed.error)
