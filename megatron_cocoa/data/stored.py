"""Where a picture's bytes lie: a file under a folder, a member of a tar shard, or a cell of an Arrow file.

Nothing is extracted to disk. A reference is small, hashable and can be sent to another process; it opens what it names
each time, below the folder that it may not leave.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Literal

import pyarrow as pa

from megatron_cocoa.data.decode import PictureError

_MAX_MEMBER_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """A picture that is no file of the data folder.

    Args:
        root: folder that ``path`` may not leave.
        path: file under ``root``: the picture itself, or what it lies in.
        kind: ``file``; ``slice``, with ``place`` the offset and number of bytes; ``cell``, with ``place`` the row
            and, in a column of lists, the place in its list.
        column: for ``cell``: a column of bytes, or of records with a field ``bytes``, or of lists of these.
    """

    root: str
    path: str
    kind: Literal["file", "slice", "cell"] = "file"
    place: tuple[int, ...] = ()
    column: str = ""

    def __str__(self) -> str:
        where = {"file": "", "slice": f" at byte {self.place[:1]}", "cell": f" row {self.place} of {self.column}"}
        return f"{self.path}{where[self.kind]}"


PictureRef = str | StoredPicture
"""A path relative to the data folder, or where else the bytes lie."""


def inside_root(root: Path, path: str) -> Path:
    """``root / path`` with links resolved.

    Args:
        root: a folder, itself resolved.

    Raises:
        PictureError: if that leaves ``root``, by ``..``, by an absolute path or by a link, or is no path at all.
    """
    try:
        resolved = (root / path).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise PictureError("missing_picture", f"image path {path!r} is no path: {error}") from error
    if not resolved.is_relative_to(root):
        raise PictureError("outside_data_folder", f"image path {path!r} leaves the data folder {root}")
    return resolved


def open_picture(ref: PictureRef, root: Path) -> Path | IO[bytes]:
    """The file of ``ref``, or its bytes.

    Args:
        ref: a plain path is relative to ``root``.
        root: the data folder, resolved.

    Raises:
        PictureError: for a path outside of its folder, or bytes that are not there or cannot be read.
    """
    if isinstance(ref, str):
        return inside_root(root, ref)
    # A shard was found in its folder, by a name that no data gave: it may be a link, as in the hub's cache.
    path = Path(ref.root, ref.path) if ref.kind == "slice" else inside_root(_resolved(ref.root), ref.path)
    if ref.kind == "file":
        return path
    # A network file system may refuse once what it gives a moment later.
    for is_last in (False, True):
        try:
            return io.BytesIO(_stored_bytes(ref, path))
        except (PictureError, MemoryError):
            raise
        except Exception as error:
            # What an archive that was cut or exchanged raises depends on where: KeyError, IndexError, Arrow's own.
            if is_last:
                raise PictureError("unreadable_picture", f"{ref} cannot be read: {error!r}") from error


@lru_cache(maxsize=256)
def _resolved(root: str) -> Path:
    return Path(root).resolve()


def _stored_bytes(ref: StoredPicture, path: Path) -> bytes:
    if not path.is_file():
        raise PictureError("missing_picture", f"{path} is not a file")
    return _slice(path, *ref.place) if ref.kind == "slice" else _cell(path, ref.column, *ref.place)


def _slice(path: Path, offset: int, size: int) -> bytes:
    if size > _MAX_MEMBER_BYTES:
        raise PictureError("too_large", f"{path} holds a picture of {size} bytes, at most {_MAX_MEMBER_BYTES} are read")
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise EOFError(f"{path} has {len(data)} bytes from byte {offset} on, needed {size}: it is cut short")
    return data


def _cell(path: Path, column: str, row: int, index: int | None = None) -> bytes:
    cell = arrow_table(path)[column][row]
    value = (cell if index is None else cell.values[index]).as_py()
    value = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(value, bytes):
        raise PictureError("missing_picture", f"{path} holds no picture in row {row} of column {column}")
    return value


def arrow_table(path: Path) -> pa.Table:
    """The table of an Arrow file, in stream or file format, memory-mapped: rows are read when they are asked for.

    Raises:
        ValueError: if the file is not such a table, or is cut short.
    """
    # A map that was opened before a fork may be shared, the reader's own state may not.
    return _mapped(str(path), os.getpid())


@lru_cache(maxsize=64)
def _mapped(path: str, process: int) -> pa.Table:
    try:
        with pa.memory_map(path) as source:
            try:
                return pa.ipc.open_stream(source).read_all()
            except pa.ArrowInvalid:
                source.seek(0)
                return pa.ipc.open_file(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole Arrow file: {error}") from error
