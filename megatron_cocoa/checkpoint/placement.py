"""Putting a finished folder in its place: whole or not at all.

A folder is written beside its target under a name that says it is incomplete, forced to disk, and renamed. Whoever
kills the writer finds either the finished folder or one that every reader refuses.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INCOMPLETE_SUFFIX = ".incomplete"
"""Folders of this name are being written, or were when their writer was killed."""

REPLACED_SUFFIX = ".replaced"
"""Of a folder that another one is about to replace."""


def check_target(target: Path, source: Path, *, marker: str, kind: str, overwrite: bool) -> None:
    """Refuse a target that must not be written.

    Args:
        target: folder that is to be created.
        source: folder that is read, and must survive.
        marker: file that a folder of the right kind holds.
        kind: what such a folder is called in messages.
        overwrite: whether an existing folder of that kind may be replaced.

    Raises:
        ValueError: if the target exists and ``overwrite`` is off, or it is of another kind, or the source or a
            folder around it.
    """
    if not os.path.lexists(target):
        return
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is the source folder itself: choose another target")
    if not overwrite:
        raise ValueError(f"{target} exists: choose another target or ask to overwrite it (--overwrite)")
    if not target.is_dir() or (any(target.iterdir()) and not (target / marker).is_file()):
        raise ValueError(f"{target} is not a {kind} (no {marker}), and will not be overwritten")
    if target.resolve() in source.resolve().parents:
        raise ValueError(f"{target} contains the source folder {source}: choose another target")


@contextmanager
def new_folder(target: Path, *, num_bytes: int = 0) -> Iterator[Path]:
    """A folder to write into, which takes the target's name and place when the block ends without an error.

    Args:
        target: absolute path; a folder that is there is replaced, after ``check_target``. A link stays, and the folder
            that it names is replaced: people link to the disk that has the room.
        num_bytes: what will be written at least.

    Raises:
        ValueError: if the disk has less room than ``num_bytes``.
    """
    target = _real(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < num_bytes:
        raise ValueError(
            f"{target.parent} has {free / 1e9:.2f} GB free, needed {num_bytes / 1e9:.2f} GB for {target.name}: free "
            f"space or choose another target"
        )
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{INCOMPLETE_SUFFIX}")
    work.mkdir()
    try:
        yield work
        _put_in_place(work, target)
    except BaseException:
        # A full disk or an interrupt must not leave the half behind either.
        shutil.rmtree(work, ignore_errors=True)
        raise


def leftovers(target: Path) -> list[Path]:
    """Folders that killed writers of ``target`` left beside it; one that is being written now is among them."""
    target = _real(target)
    suffixes = (INCOMPLETE_SUFFIX, REPLACED_SUFFIX)
    return [path for suffix in suffixes for path in sorted(target.parent.glob(f".{target.name}.*{suffix}"))]


def _real(target: Path) -> Path:
    return target.resolve() if target.is_symlink() else target


def _put_in_place(work: Path, target: Path) -> None:
    """Make ``work`` durable and rename it to ``target``; an earlier target is moved aside first and deleted last."""
    force_to_disk(work)
    if not target.exists():
        os.rename(work, target)
    else:
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{REPLACED_SUFFIX}")
        os.rename(target, aside)
        try:
            os.rename(work, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside)
    sync_folder(target.parent)


def force_to_disk(root: Path) -> None:
    """Return when a crash of the machine would find every file below ``root`` whole."""
    for folder, _, files in os.walk(root):
        for file in files:
            with open(os.path.join(folder, file), "rb") as handle:
                os.fsync(handle.fileno())
        sync_folder(Path(folder))


def sync_folder(path: Path) -> None:
    """Return when a crash of the machine would find the names in ``path`` as they are."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
