"""When a run must end before its last step: on a signal from the batch system, or when its time is used up."""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from megatron_cocoa.parallel import device
from megatron_cocoa.parallel.stop_signals import STOP_SIGNALS


class StopWatch:
    """Lets all ranks decide together, at the end of a step, whether to stop.

    A signal may reach one rank only, and clocks differ: so each step asks whether any rank wants to stop, or has failed
    in something that it does alone. Use it as a context manager, which sets the signal handlers and restores the
    previous ones.

    Args:
        budget_minutes: stop after this time; None for no limit.
        spent_seconds: how much of it has passed already, such as the time since the process started.
    """

    def __init__(self, *, budget_minutes: float | None = None, spent_seconds: float = 0.0) -> None:
        self._deadline = None if budget_minutes is None else time.monotonic() + 60 * budget_minutes - spent_seconds
        self._signal: int | None = None
        self._failure: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopWatch:
        self._previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def fail(self, message: str) -> None:
        """End all ranks with ``message`` when they next ask for a reason; one rank calls it, where it cannot go on."""
        self._failure = message

    def reason(self) -> str | None:
        """Why to stop now, the same on every rank; None to continue. A collective: every rank calls it.

        Raises:
            ValueError: on every rank, if one has called ``fail``.
        """
        late = self._deadline is not None and time.monotonic() >= self._deadline
        failed = 0 if self._failure is None else dist.get_rank() + 1
        wish = torch.tensor([self._signal or 0, int(late), failed], dtype=torch.int32, device=device.device())
        dist.all_reduce(wish, op=dist.ReduceOp.MAX)
        number, is_late, failed = wish.tolist()
        if failed:
            told = [self._failure]
            dist.broadcast_object_list(told, src=failed - 1)
            raise ValueError(told[0])
        if number:
            return f"signal {signal.Signals(number).name}"
        return "checkpoint.time_budget_minutes is used up" if is_late else None
