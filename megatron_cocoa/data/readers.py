"""Files to records: JSONL, parquet, and Hugging Face datasets saved to disk. Tar shards are in ``webdataset.py``.

A reader yields ``(default name, record)`` and knows nothing of stages. What is wrong with one record comes out as a
``BadRow`` in its place and is counted; what is wrong with a file (cut short, not UTF-8, a column missing) ends the
reading: half of a file must not pass for the whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_cocoa.data.stored import StoredPicture, arrow_table, inside_root

_BATCH_ROWS = 4096


class BadRow(ValueError):
    """A malformed row; ``str()`` is the reason under which it is counted."""


Record = tuple[str, dict | BadRow]
"""A default name, and column values: text, numbers, picture references, lists of these."""


def jsonl_records(path: str | Path) -> Iterator[Record]:
    """One JSON object a line, UTF-8, with or without the mark that some editors write in front.

    Raises:
        ValueError: if the file cannot be read or is in another encoding.
    """
    path = Path(path)
    try:
        file = path.open(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name it, or the folder that has it") from error
    with file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path.stem}:{number}", _json_object(line)
        except UnicodeDecodeError as error:
            raise not_utf8(path, error) from error


def not_utf8(path: Path, error: UnicodeDecodeError) -> ValueError:
    """What to say of a file of text that could not be decoded."""
    if error.object.startswith(b"\x1f\x8b"):
        return ValueError(f"{path} is compressed (gzip): unpack it, a JSONL file is read as plain text")
    return ValueError(f"{path} is not UTF-8 text ({error.reason}): write it anew as UTF-8")


def _json_object(line: str) -> dict | BadRow:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return BadRow("not_json")
    return record if isinstance(record, dict) else BadRow("not_an_object")


def parquet_records(files: Sequence[Path], *, needed: Sequence[str] = ()) -> Iterator[Record]:
    """The rows of parquet files, one file after the other.

    Args:
        files: each must have the columns ``needed``; all its columns are read.
        needed: names of columns.

    Raises:
        ValueError: if a file is cut short or no parquet, or lacks a column.
    """
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                _check_columns(path, file.schema_arrow.names, needed)
                row = 0
                for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                    yield from _batch_records(batch, path.stem, row)
                    row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a whole parquet file: {error}") from error


def saved_dataset_records(folder: Path, *, split: str | None = None) -> Iterator[Record]:
    """The rows of a Hugging Face dataset that ``save_to_disk`` wrote; pictures stay where they are until asked for.

    Args:
        folder: of a ``Dataset``, or of a ``DatasetDict``.
        split: of a ``DatasetDict``; None takes its only one.

    Raises:
        ValueError: if the folder holds no saved dataset or several splits to choose from, or a file is cut short.
    """
    folder = _split_folder(folder, split)
    for path in _data_files(folder):
        table = arrow_table(path)
        pictures = [name for name in table.column_names if _holds_pictures(table.schema.field(name).type)]
        texts = table.select([name for name in table.column_names if name not in pictures])
        columns = {name: _references(table[name], folder, path, name) for name in pictures}
        row = 0
        for batch in texts.to_batches(max_chunksize=_BATCH_ROWS):
            for offset, (name, record) in enumerate(_batch_records(batch, path.stem, row)):
                if isinstance(record, dict):
                    record |= {column: values[row + offset] for column, values in columns.items()}
                yield name, record
            row += batch.num_rows


def _check_columns(path: Path, found: Sequence[str], needed: Sequence[str]) -> None:
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(
            f"{path} lacks the column(s) {', '.join(missing)}, it has {', '.join(found)}: name them in the source's "
            f"`columns`, as {{{missing[0]}: their name}}"
        )


def _batch_records(batch: pa.RecordBatch, stem: str, first: int) -> Iterator[Record]:
    columns = {name: _values(batch.column(index)) for index, name in enumerate(batch.schema.names)}
    for i in range(batch.num_rows):
        record = {name: values[i] for name, values in columns.items()}
        bad = next((name for name, value in record.items() if isinstance(value, BadRow)), None)
        yield f"{stem}:{first + i}", record if bad is None else BadRow(f"{bad}_not_utf8")


def _values(column: pa.Array) -> list:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(column, row) for row in range(len(column))]


def _value(column: pa.Array, row: int) -> object:
    try:
        return column[row].as_py()
    except UnicodeDecodeError:
        return BadRow("not_utf8")


def _split_folder(folder: Path, split: str | None) -> Path:
    if not (folder / "dataset_dict.json").exists():
        return folder
    splits = _read_json(folder / "dataset_dict.json").get("splits", [])
    if split is None and len(splits) == 1:
        split = splits[0]
    if split not in splits:
        raise ValueError(f"{folder} has the splits {', '.join(map(str, splits))}: set `split` to one of them")
    return folder / split


def _data_files(folder: Path) -> list[Path]:
    entries = _read_json(folder / "state.json").get("_data_files", [])
    try:
        return [inside_root(folder.resolve(), entry["filename"]) for entry in entries]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{folder / 'state.json'} does not list its data files: {error!r}") from error


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read, and a dataset saved with save_to_disk has it: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, needed an object: save the dataset anew")
    return found


def _holds_pictures(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    is_record = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    return is_record or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _references(column: pa.ChunkedArray, folder: Path, path: Path, name: str) -> list:
    """For each row of a picture column where its picture is: a cell of this file, or the path that it names."""
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    relative = str(path.relative_to(folder.resolve()))

    def reference(has_bytes: bool, file: str | None, place: tuple[int, ...]) -> StoredPicture | str | None:
        if has_bytes:
            return StoredPicture(str(folder), relative, "cell", place, name)
        return file

    found: list = []
    for chunk in column.chunks:
        for bytes_and_path in _present(chunk, is_list):
            row = len(found)
            if isinstance(bytes_and_path, list):
                found.append([reference(*one, (row, index)) for index, one in enumerate(bytes_and_path)])
            else:
                found.append(None if bytes_and_path is None else reference(*bytes_and_path, (row,)))
    return found


def _present(chunk: pa.Array, is_list: bool) -> Iterator:
    """``(has bytes, path)`` of each row, without reading the bytes; lists of these in a column of lists."""
    if is_list:
        inner, offsets = list(_present(chunk.values, False)), chunk.offsets.to_pylist()
        for row, valid in enumerate(chunk.is_valid().to_pylist()):
            yield inner[offsets[row] : offsets[row + 1]] if valid else None
        return
    valid = chunk.is_valid().to_pylist()
    if not pa.types.is_struct(chunk.type):
        yield from ((True, None) if has else None for has in valid)
        return
    has_bytes = chunk.field("bytes").is_valid().to_pylist()
    has_path = chunk.type.get_field_index("path") >= 0
    paths = chunk.field("path").to_pylist() if has_path else [None] * len(chunk)
    yield from ((b, p) if v else None for v, b, p in zip(valid, has_bytes, paths))
