"""WebDataset tar shards to records, read in place.

The members of a sample follow one another and share a name up to its first dot: ``0001.jpg``, ``0001.txt``. Nothing is
extracted: a picture is remembered by the shard, the offset and the number of its bytes.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from megatron_cocoa.data.readers import BadRow, Record
from megatron_cocoa.data.stored import StoredPicture

_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "jp2")
_CAPTIONS = ("txt", "caption", "text")
_IMAGE_COLUMNS = ("image_path", "qry_image_path", "pos_image_path", "neg_image_path")
_MAX_TEXT_BYTES = 16 * 2**20
_BLOCK = tarfile.BLOCKSIZE


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
    for shard in shards:
        for key, members in groupby(_members(shard), key=lambda member: _key(member.name)):
            yield f"{shard.stem}/{key}", _record(shard, f"{shard.stem}/{key}", list(members), columns)


def _members(shard: Path) -> Iterator[tarfile.TarInfo]:
    end = 0
    try:
        with tarfile.open(shard, mode="r:") as archive:
            for member in archive:
                # The archive would remember every member, millions in a large data set.
                archive.members = []
                if not member.isdir():
                    end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                    yield member
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{shard} is not a whole, uncompressed tar file: {error}") from error
    if shard.stat().st_size < end + _BLOCK:
        raise ValueError(f"{shard} has {shard.stat().st_size} bytes and its members end at {end}: it is cut short")


def _key(name: str) -> str:
    # A name of another encoding has stand-ins for its bytes, which nothing else can write.
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    folder, _, file = name.rpartition("/")
    stem = file.partition(".")[0]
    return f"{folder}/{stem}" if folder else stem


def _record(shard: Path, name: str, members: list[tarfile.TarInfo], columns: Mapping[str, str]) -> dict | BadRow:
    theirs = {ours: columns.get(ours, ours) for ours in ("qry", "caption", *_IMAGE_COLUMNS)}
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
            record |= _json(shard, by_extension["json"])
            named = [theirs[column] for column in _IMAGE_COLUMNS if theirs[column] in record]
            if named or theirs["qry"] in record or len(pictures) != 1:
                return record | {column: _named(record[column], pictures, column) for column in named}
        elif len(pictures) > 1:
            raise BadRow("several_pictures_without_json")
        caption = next((by_extension[extension] for extension in _CAPTIONS if extension in by_extension), None)
        record[theirs["image_path"]] = next(iter(pictures.values()), "")
        if caption is not None and theirs["caption"] not in record:
            record[theirs["caption"]] = _text(shard, caption)
        return record
    except BadRow as error:
        return error


def _extension(member: tarfile.TarInfo) -> str:
    parts = PurePosixPath(member.name)
    if not member.isreg() or parts.is_absolute() or ".." in parts.parts:
        raise BadRow("unsafe_member")
    return parts.name.partition(".")[2].lower()


def _named(value: object, pictures: dict[str, StoredPicture], column: str) -> object:
    if isinstance(value, list):
        return [_named(item, pictures, column) for item in value]
    if value in (None, ""):
        return ""
    if not isinstance(value, str) or value not in pictures:
        raise BadRow(f"{column}_not_in_shard")
    return pictures[value]


def _json(shard: Path, member: tarfile.TarInfo) -> dict:
    try:
        found = json.loads(_text(shard, member))
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, BadRow) else BadRow("not_json") from error
    if not isinstance(found, dict):
        raise BadRow("not_an_object")
    return found


def _text(shard: Path, member: tarfile.TarInfo) -> str:
    if member.size > _MAX_TEXT_BYTES:
        raise BadRow("text_member_too_large")
    with shard.open("rb") as file:
        file.seek(member.offset_data)
        try:
            return file.read(member.size).decode("utf-8")
        except UnicodeDecodeError:
            raise BadRow("not_utf8") from None
