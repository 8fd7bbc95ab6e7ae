"""What is to be embedded: rows of a JSONL or parquet file, or the pictures of a folder, each with an id."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_cocoa.data.readers import not_utf8
from megatron_cocoa.data.row_parsing import half_surrogate, without_marks

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True, slots=True)
class CorpusRow:
    """One thing to embed: ``text`` and ``image`` may each be empty, not both; ``image`` is relative to the root."""

    row_id: str
    text: str
    image: str


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read.

    Under these names a file may lack ``row_id`` (rows are numbered) and one of the others; another name must be there.
    """

    row_id: str = "id"
    text: str = "text"
    image: str = "image"


@dataclass(frozen=True)
class Corpus:
    """All rows, in order; every rank reads the same.

    Args:
        rows: what is to be embedded.
        root: folder of the pictures, resolved.
        passed_over: what else lies in a folder of pictures, by its path there.
    """

    rows: tuple[CorpusRow, ...]
    root: Path
    passed_over: tuple[str, ...] = ()

    def item(self, index: int) -> dict[str, Any]:
        """The row as ``CocoaEmbedder.encode`` takes it; marks of a picture that the row does not have go.

        Raises:
            ValueError: if the picture's path leaves the root.
        """
        row = self.rows[index]
        if not row.image:
            return {"text": without_marks(row.text)}
        path = (self.root / row.image).resolve()
        if not path.is_relative_to(self.root):
            raise ValueError(f"row {row.row_id!r}: image path {row.image!r} leaves the folder {self.root}")
        return {"text": row.text, "image": path}

    def fingerprint(self) -> str:
        """Changes with any id, text or path, and with the size of any picture."""
        digest = hashlib.sha256()
        for row in self.rows:
            path = self.root / row.image
            size = path.stat().st_size if row.image and path.is_file() else 0
            digest.update(json.dumps([row.row_id, row.text, row.image, size]).encode())
        return digest.hexdigest()


def read_corpus(path: str | Path, *, image_root: str | Path | None = None, columns: Columns = Columns()) -> Corpus:
    """Read a corpus; the ids are all different.

    Args:
        path: ``.jsonl``, ``.parquet`` (needs pyarrow), or a folder, whose pictures are taken in order of their paths.
        image_root: folder that image paths are relative to and may not leave; None for the corpus's own.
        columns: names of the columns.

    Raises:
        ValueError: naming the first row that is malformed, an id that occurs twice, or a column that was asked for by
            name and that no row has.
    """
    path = Path(path)
    passed_over: list[str] = []
    if path.is_dir():
        pictures, passed_over = _pictures(path)
        rows, root = [CorpusRow(name, "", name) for name in pictures], path
    elif path.suffix == ".parquet":
        rows, root = _rows(_parquet(path, columns), path, columns), path.parent
    elif path.is_file():
        rows, root = _rows(_jsonl(path), path, columns), path.parent
    else:
        raise ValueError(f"{path} does not exist: needed a .jsonl or .parquet file, or a folder of pictures")
    if not rows:
        kinds = ", ".join(sorted(PICTURE_SUFFIXES))
        raise ValueError(f"{path} has nothing to embed: no rows, or no pictures ({kinds})")
    seen: set[str] = set()
    for row in rows:
        _check_unicode(row, path)
        if row.row_id in seen:
            raise ValueError(f"{path}: the id {row.row_id!r} occurs twice: each row needs its own")
        seen.add(row.row_id)
    return Corpus(tuple(rows), Path(image_root or root).resolve(), tuple(passed_over))


def _check_unicode(row: CorpusRow, path: Path) -> None:
    """An id that is no Unicode text could not be written down, a text could not be embedded."""
    whole = f"{row.row_id}{row.text}{row.image}"
    at = half_surrogate(whole)
    if at is not None:
        found = f"{path}: row {row.row_id!r} holds the character {whole[at]!r}"
        raise ValueError(f"{found}, which is no Unicode text: mend the row, or rename the file")


def _pictures(folder: Path) -> tuple[list[str], list[str]]:
    """Picture files below ``folder`` by their endings, and whatever else is there: linked folders are not searched."""
    pictures, others = [], []
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix.lower() in PICTURE_SUFFIXES:
            pictures.append(path.relative_to(folder).as_posix())
        elif path.is_symlink() or not path.is_dir():
            others.append(path.relative_to(folder).as_posix())
    return sorted(pictures), sorted(others)


def _jsonl(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json(line, f"{path}, line {number}")
        except UnicodeDecodeError as error:
            raise not_utf8(path, error) from error


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _parquet(path: Path, columns: Columns) -> Iterator[dict]:
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path} needs the package pyarrow: pip install pyarrow, or write the corpus as JSONL")
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        wanted = {columns.row_id, columns.text, columns.image}
        names = [name for name in file.schema_arrow.names if name in wanted]
        for batch in file.iter_batches(columns=names):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not readable parquet: {error}") from error


def _rows(records: Iterator[Any], path: Path, columns: Columns) -> list[CorpusRow]:
    rows, seen = [], set()
    for number, record in enumerate(records):
        rows.append(_row(record, number, path, columns))
        seen.update(record)
    named = {getattr(columns, field.name) for field in fields(columns)} - {field.default for field in fields(columns)}
    if rows and (absent := sorted(named - seen)):
        raise ValueError(f"{path} has no column {', '.join(absent)}: name one that is there, or leave the option out")
    return rows


def _row(record: Any, number: int, path: Path, columns: Columns) -> CorpusRow:
    where = f"{path}, row {number}"
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}, needed an object with columns")
    row_id = record.get(columns.row_id, number)
    values = {name: record.get(name) or "" for name in (columns.text, columns.image)}
    for name, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: column {name} is a {type(value).__name__}, needed text")
    if not isinstance(row_id, (str, int)):
        raise ValueError(f"{where}: column {columns.row_id} is a {type(row_id).__name__}, needed text or a number")
    if not any(value.strip() for value in values.values()):
        found = ", ".join(map(str, record)) or "none"
        raise ValueError(f"{where} has neither {columns.text} nor {columns.image} (columns found: {found})")
    return CorpusRow(str(row_id), values[columns.text], values[columns.image])
