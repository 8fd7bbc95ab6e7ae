"""The processes behind Megatron's checkpoint writes, tied to the life of their rank.

Megatron forks one for each write in the background, whose only use is to that rank, and starts one a rank that carries
the writers' results back. This second one outlives a rank that is killed: under ``torchrun --max-restarts`` each
restart would leave another one. And it would import torch, to hold results that it only hands on: seconds of the first
checkpoint, and memory on every rank for as long as the run lasts. This module imports little, because that process
imports it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import queue
import signal
import sys
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager
from typing import Any

from megatron_cocoa.parallel.stop_signals import STOP_SIGNALS, outlive_stop_signals

PR_SET_PDEATHSIG = 1
"""Of Linux' prctl(2): the signal that a process gets when its parent ends."""

_manager: SyncManager | None = None


def end_with_parent() -> None:
    """Stay for as long as the process that started this one, and no longer (asked of the kernel, on Linux)."""
    outlive_stop_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid != os.getppid():
            # It has ended before the kernel was asked.
            os.kill(os.getpid(), signal.SIGKILL)


def start_results_queue(module) -> None:
    """Give Megatron's ``filesystem_async`` module a new results queue, whose process ends with this one.

    New for each write: of one that failed on another rank, this rank's results are still in the old queue, and would be
    taken for those of the next. Where a Megatron-Core release keeps its queue elsewhere, nothing is changed.
    """
    global _manager
    if not hasattr(module, "_results_queue"):
        return
    if _manager is None or not _manager._process.is_alive():
        _manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        # The new process has this mask until it ignores the signals. Its interpreter takes a while to start.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            _manager.start(initializer=end_with_parent)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    module._results_queue = _SealedQueue(_manager.Queue())


class _SealedQueue:
    """What Megatron asks of its results queue, with values that its process sees as bytes."""

    def __init__(self, carrier: queue.Queue) -> None:
        self._carrier = carrier

    def put(self, value: Any) -> None:
        self._carrier.put(pickle.dumps(value))

    def get_nowait(self) -> Any:
        """The oldest value.

        Raises:
            queue.Empty: if there is none.
        """
        return pickle.loads(self._carrier.get_nowait())
