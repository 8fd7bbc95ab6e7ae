"""Files that are either whole or absent under their name, whenever the process that writes them is killed."""

from __future__ import annotations

import os
from pathlib import Path


def unfinished(path: Path) -> Path:
    """What a writer of ``path`` that was killed has left beside it."""
    return path.with_name(f".{path.name}.incomplete")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content`` beside ``path``, force it to disk, and only then give it that name, over an older file.

    A killed writer leaves ``.NAME.incomplete``, which the next one replaces. Text is written as UTF-8; bytes of file
    names that are not UTF-8 (Python's surrogate escapes) come out as they went in.

    Raises:
        OSError: if the folder cannot be written; an older file then stays as it is.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", errors="surrogateescape")
    work = unfinished(path)
    with work.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    work.replace(path)
