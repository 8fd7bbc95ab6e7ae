"""One reader a replica: pictures are decoded once, whatever the tensor, context and pipeline parallel degrees."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from megatron_cocoa.batch import PackedBatch
from megatron_cocoa.data.loader import StageLoader
from megatron_cocoa.parallel.replica import ReplicaLink


@dataclass(frozen=True)
class _Handed:
    """What crosses a replica with each step, but for pixels and pixel targets.

    Args:
        batches: without these two.
        shapes: of these two in each batch, None where there is none.
        state, statistics: of the reader after the step.
        error: why the reader could not go on.
    """

    batches: tuple[PackedBatch, ...] = ()
    shapes: tuple[tuple[tuple[int, ...] | None, tuple[int, ...] | None], ...] = ()
    state: dict | None = None
    statistics: dict[str, float] | None = None
    error: str | None = None


class ReplicaLoader:
    """``StageLoader`` for a rank of a model-parallel replica: the same face, the same batches, one reader.

    Every rank of the world must build it at the same time, and the ranks of a replica must call its methods together.

    Args:
        make_reader: builds the reader with everything that any rank of the replica needs; called on one rank of it.
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
            self._complete(batch, shapes, read[index] if read else None)
            for index, (batch, shapes) in enumerate(zip(handed.batches, handed.shapes))
        )
        return replace(handed, batches=batches)

    def _read(self) -> tuple[list[PackedBatch], _Handed]:
        try:
            read = self._reader.next_step()
        except ValueError as error:
            return [], _Handed(error=str(error))
        return read, _Handed(
            batches=tuple(replace(batch, pixel_values=None, unit_targets=None) for batch in read),
            shapes=tuple((_shape(batch.pixel_values), _shape(batch.unit_targets)) for batch in read),
            state=self._reader.state_dict(),
            statistics=self._reader.statistics(),
        )

    def _complete(self, batch: PackedBatch, shapes: tuple, read: PackedBatch | None) -> PackedBatch:
        pixels = targets = None
        if shapes[0] is not None:
            value = None if read is None else read.pixel_values
            pixels = self._link.share_tensor(value, shapes[0], torch.float32, to="tower")
        if shapes[1] is not None:
            value = None if read is None else read.unit_targets
            targets = self._link.share_tensor(value, shapes[1], torch.float32, to="decoder")
            if not self._needs_unit_targets:
                # The masked units are still counted on every rank, see PackOptions.
                targets = torch.zeros((shapes[1][0], 0), dtype=torch.float32)
        return replace(batch, pixel_values=pixels if self._needs_pixels else None, unit_targets=targets)


def _shape(value: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)


def _raise_error(handed: _Handed) -> None:
    if handed.error is not None:
        raise ValueError(handed.error)
