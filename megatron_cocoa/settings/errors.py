"""The one error that a mistake in the settings ends in."""

from __future__ import annotations


class SettingsError(ValueError):
    """A mistake in the settings that a user can correct; the message is one line.

    Entry points print it on rank 0 and exit with status 2.
    """


def one_line(error: Exception) -> str:
    """The message of ``error`` without line breaks."""
    return " ".join(str(error).split())
