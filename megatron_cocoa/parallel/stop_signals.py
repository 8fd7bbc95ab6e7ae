"""The signals that batch systems send before they end a job, and how helper processes of a rank survive them.

Such a signal may reach every process of a job. This module imports little, because the helper process of the checkpoint
writers imports it.
"""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGINT keeps its meaning, an interrupt at once."""


def outlive_stop_signals() -> None:
    """Ignore them in this process, which its rank still needs for the last checkpoint, and ends after that."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
