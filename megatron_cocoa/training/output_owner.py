"""Which of several runs in one output folder may write there: the one that started last.

A scheduler may start a job again while the first one still lives, on a node that hangs or behind a network that is
split. Every start appends a line to one file, and whoever's line is not the last one has been replaced: it reads the
file before it writes anything else, and ends.

Only one file that is there from the start, and grows, serves on shared file systems. NFS asks its server anew whenever
such a file is opened, whereas a name that appears or goes may stay unseen for a minute, and locks may be off. No clock
is read. Between a look and a write the other run may start: so what a look allows is a file that the other run
replaces, or a folder that takes its name only if the other run has not removed it (see ``checkpoint.writer``).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

STARTS_FILE = ".starts"
"""A line for each start of a run in the folder: its own name, and that of a launcher of it."""


class TakenOver(ValueError):
    """Another run has started in the output folder."""


class OutputOwner:
    """One process's claim to an output folder, made and looked at on the first rank alone.

    Args:
        output: the folder.
        launchers: ``LaunchInfo.launcher`` of every rank, the first rank's first. All of them restart the run together,
            and any of them may have the first rank then.
    """

    def __init__(self, output: Path, launchers: Sequence[str] = ()) -> None:
        self.output, self._launchers = output, launchers
        self._line: str | None = None

    def claim(self) -> None:
        """Take the folder, from whichever run has it.

        Raises:
            TakenOver: as ``check_restart``.
            OSError: if the file cannot be written.
        """
        self.check_restart()
        start, last = uuid.uuid4().hex, self._named_launchers()[-1]
        # A restart keeps its run's launcher as long as that takes part, whoever has the first rank. Lines of one
        # length: where two hosts append at once, NFS keeps one of them whole.
        line = f"{start} {last if last in self._launchers else next(iter(self._launchers), start)}"
        with (self.output / STARTS_FILE).open("a", encoding="ascii") as file:
            # The line's end comes first: a start that was killed in its line spoils no other.
            file.write(f"\n{line}")
            file.flush()
            os.fsync(file.fileno())
        self._line = line

    def check(self) -> None:
        """Refuse to go on once another run has started in the folder; before ``claim`` nothing is refused.

        Raises:
            TakenOver: with what to do.
            OSError: if the file cannot be read.
        """
        if self._line is not None and self._starts()[-1] != self._line:
            raise TakenOver(
                f"another run has started in output_dir {self.output} (or somebody has removed its {STARTS_FILE}), and "
                f"this one leaves the folder to it. If the other one was a mistake, end it and start this one again, "
                f"with --resume true"
            )

    def check_restart(self) -> None:
        """Refuse to start if this is a launcher's restart of a run that was taken over: they would go on in turns.

        Raises:
            TakenOver: with what to do.
            OSError: if the file cannot be read.
        """
        *earlier, last = self._named_launchers()
        if last not in self._launchers and not set(self._launchers).isdisjoint(earlier):
            raise TakenOver(
                f"torchrun has restarted a run that has left output_dir {self.output} to another one: refused, since "
                f"the two would take it from each other in turns. If the other one has ended, start this one by hand, "
                f"with --resume true"
            )

    def _named_launchers(self) -> list[str]:
        return [line.partition(" ")[2] for line in self._starts()]

    def _starts(self) -> list[str]:
        try:
            # A file that a host's crash has spoilt ends the run as another start does, not the first rank alone.
            return (self.output / STARTS_FILE).read_text(encoding="ascii", errors="replace").split("\n")
        except (FileNotFoundError, NotADirectoryError):
            return [""]
