"""The queue process behind Megatron's checkpoint writes, tied to the life of its rank.

Megatron starts one process a rank that carries results from the forked writers back. It outlives a rank that is
killed, with the memory of an imported torch: under ``torchrun --max-restarts`` each restart would leave another one.
This module imports little, because that process imports it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from multiprocessing.managers import SyncManager

PR_SET_PDEATHSIG = 1
"""Of Linux' prctl(2): the signal that a process gets when its parent ends."""

_manager: SyncManager | None = None


def end_with_parent() -> None:
    """Ask the kernel to end this process when the one that started it is gone; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start_results_queue(module) -> None:
    """Give Megatron's ``filesystem_async`` module a results queue whose process ends with this one, once.

    Where a Megatron-Core release keeps its queue elsewhere, nothing is changed.
    """
    global _manager
    if getattr(module, "_results_queue", module) is None:
        _manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        _manager.start(initializer=end_with_parent)
        module._results_queue = _manager.Queue()
