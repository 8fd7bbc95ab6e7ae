"""What batch systems send before they end a job, and how processes that a rank still needs live through it.

It may reach every process of a job. Imports little: the process behind the checkpoint writers imports it.
"""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGINT keeps its meaning, an interrupt at once."""


def outlive_stop_signals() -> None:
    """Ignore them in this process: the rank that started it makes its last checkpoint, and ends it after that."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
