"""WebDataset tar shards to records, read in place.

The members of a sample follow one another and share a name up to its first dot: ``0001.jpg``, ``0001.txt``. Nothing is
extracted: a picture is remembered by the shard, the offset and the number of its bytes.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import IO

from megatron_cocoa.data.readers import BadRow, Record
from megatron_cocoa.data.stored import StoredPicture

_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "jp2")
_CAPTIONS = ("txt", "caption", "text")
_IMAGE_COLUMNS = ("image_path", "qry_image_path", "pos_image_path", "neg_image_path")
_MAX_TEXT_BYTES = 16 * 2**20
_BLOCK = tarfile.BLOCKSIZE
_FILLERS = b" \0"
"""Around the numbers of a header."""


def shard_records(path: Path, columns: Mapping[str, str] = MappingProxyType({})) -> Iterator[Record]:
    """The samples of a ``.tar`` file, or of all ``.tar`` files of a folder in the order of their names.

    A sample's ``.json`` gives its columns, in which a picture is named by its member's extension (``jpg``,
    ``query.png``). Where it is no pair and names no picture, or is not there, the sample's only picture is its
    ``image_path``, and its ``.txt`` the ``caption`` that the ``.json`` may lack.

    Args:
        path: of the shard or the folder.
        columns: our names of columns to the shards'; records come under the shards' names.

    Raises:
        ValueError: if there is no shard, or one is compressed, cut short or no tar file.
    """
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not shards or not shards[0].is_file():
        raise ValueError(f"{path} holds no .tar files: compressed shards must be unpacked, they are read in place")
    theirs = {ours: columns.get(ours, ours) for ours in ("qry", "caption", *_IMAGE_COLUMNS)}
    for shard in shards:
        # Beside the archive's own file, whose place it would have to restore for each text.
        with shard.open("rb") as texts:
            for key, members in groupby(_members(shard), key=lambda member: _key(member.name)):
                name = f"{shard.stem}/{key}"
                yield name, _record(shard, texts, name, list(members), theirs)


class _Header(tarfile.TarInfo):
    """A member's header. Of a regular file's only name and size are looked at, in a third of the time of all fields."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        # The type, and the first byte of a long name's beginning.
        if len(buf) != _BLOCK or buf[156:157] != tarfile.REGTYPE or buf[345]:
            return super().frombuf(buf, encoding, errors)
        try:
            size, checksum = int(buf[124:136].strip(_FILLERS), 8), int(buf[148:156].strip(_FILLERS), 8)
        except ValueError:
            return super().frombuf(buf, encoding, errors)
        # The sum of all bytes, where those of the sum itself count as spaces.
        if sum(buf) - sum(buf[148:156]) + 8 * 32 != checksum:
            return super().frombuf(buf, encoding, errors)
        found = cls(buf[:100].partition(b"\0")[0].decode(encoding, errors))
        found.size, found.chksum = size, checksum
        return found


def _members(shard: Path) -> Iterator[tarfile.TarInfo]:
    end = 0
    try:
        with tarfile.open(shard, mode="r:", tarinfo=_Header) as archive:
            for member in archive:
                # The archive would remember every member, millions in a large data set.
                archive.members = []
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if not member.isdir():
                    yield member
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{shard} is not a whole, uncompressed tar file: {error}") from error
    _check_end(shard, end)


def _check_end(shard: Path, end: int) -> None:
    """Refuse a shard without an end mark behind its last member, or with more behind that.

    ``tarfile`` stops without a word at a header that is damaged, and where a second archive begins.
    """
    size = shard.stat().st_size
    if size < end + _BLOCK:
        raise ValueError(f"{shard} has {size} bytes and its members end at {end}: it is cut short")
    with shard.open("rb") as file:
        file.seek(end)
        while rest := file.read(2**20):
            if rest.count(0) != len(rest):
                raise ValueError(
                    f"{shard} has {size} bytes, and members can be read up to byte {end} alone: it is damaged there, "
                    f"or several archives were joined; write it anew, or each archive into a file of its own"
                )


def _key(name: str) -> str:
    # A name of another encoding has stand-ins for its bytes, which nothing else can write.
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    folder, _, file = name.rpartition("/")
    stem = file.partition(".")[0]
    return f"{folder}/{stem}" if folder else stem


def _record(
    shard: Path, texts: IO[bytes], name: str, members: list[tarfile.TarInfo], theirs: Mapping[str, str]
) -> dict | BadRow:
    try:
        by_extension = {_extension(member): member for member in members}
        if len(by_extension) != len(members):
            raise BadRow("member_twice")
        pictures = {
            extension: StoredPicture(str(shard.parent), shard.name, "slice", (member.offset_data, member.size))
            for extension, member in by_extension.items()
            if extension.rpartition(".")[2] in _PICTURES
        }
        record: dict = {"id": name}
        if "json" in by_extension:
            record |= _json(texts, by_extension["json"])
            named = [theirs[column] for column in _IMAGE_COLUMNS if theirs[column] in record]
            if named or theirs["qry"] in record or len(pictures) != 1:
                return record | {column: _named(record[column], pictures, column) for column in named}
        elif len(pictures) > 1:
            raise BadRow("several_pictures_without_json")
        caption = next((by_extension[extension] for extension in _CAPTIONS if extension in by_extension), None)
        record[theirs["image_path"]] = next(iter(pictures.values()), "")
        if caption is not None and theirs["caption"] not in record:
            record[theirs["caption"]] = _text(texts, caption)
        return record
    except BadRow as error:
        return error


def _extension(member: tarfile.TarInfo) -> str:
    name = member.name
    if not member.isreg() or name.startswith("/") or ".." in name.split("/"):
        raise BadRow("unsafe_member")
    return name.rpartition("/")[2].partition(".")[2].lower()


def _named(value: object, pictures: dict[str, StoredPicture], column: str) -> object:
    if isinstance(value, list):
        return [_named(item, pictures, column) for item in value]
    if value in (None, ""):
        return ""
    if not isinstance(value, str) or value not in pictures:
        raise BadRow(f"{column}_not_in_shard")
    return pictures[value]


def _json(texts: IO[bytes], member: tarfile.TarInfo) -> dict:
    try:
        found = json.loads(_text(texts, member))
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, BadRow) else BadRow("not_json") from error
    if not isinstance(found, dict):
        raise BadRow("not_an_object")
    return found


def _text(texts: IO[bytes], member: tarfile.TarInfo) -> str:
    if member.size > _MAX_TEXT_BYTES:
        raise BadRow("text_member_too_large")
    texts.seek(member.offset_data)
    try:
        return texts.read(member.size).decode("utf-8")
    except UnicodeDecodeError:
        raise BadRow("not_utf8") from None
