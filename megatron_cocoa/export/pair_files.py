"""MMEB-train files as rows, read whole and written whole, with all their columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_cocoa.atomic import unfinished
from megatron_cocoa.export.hard_negatives import Content

SUFFIXES = (".parquet", ".jsonl")
NEEDED = ("qry", "qry_image_path", "pos_text", "pos_image_path")


def check_suffix(path: str | Path) -> None:
    """Refuse a file, to be read or written, whose name has another ending than ``SUFFIXES``.

    Raises:
        ValueError: naming it.
    """
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"{path} is neither {' nor '.join(SUFFIXES)}")


def read_pairs_file(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a ``.parquet`` or ``.jsonl`` file in MMEB-train's columns.

    Raises:
        ValueError: if the file cannot be read or is empty, or naming the first row that lacks a column.
    """
    path = Path(path)
    check_suffix(path)
    try:
        if path.suffix == ".parquet":
            rows = pyarrow.parquet.read_table(path).to_pylist()
        else:
            # Not splitlines: a text may hold other ends of line, such as U+2028, as they are.
            with path.open(encoding="utf-8-sig") as lines:
                rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no rows")
    for number, row in enumerate(rows):
        broken = [name for name in NEEDED if not isinstance(row, dict) or not isinstance(row.get(name) or "", str)]
        if broken or not isinstance(row.get("qry"), str) or not isinstance(row.get("pos_text"), str):
            columns = ", ".join(NEEDED)
            raise ValueError(f"{path}, row {number}: needed text in the columns {columns}, found {row!r:.200}")
    return rows


def sides(rows: list[dict[str, Any]]) -> tuple[list[Content], list[Content]]:
    """Query and positive of each row."""
    queries = [Content(row["qry"], row.get("qry_image_path") or "") for row in rows]
    return queries, [Content(row["pos_text"], row.get("pos_image_path") or "") for row in rows]


def with_negatives(
    rows: list[dict[str, Any]], negatives: list[list[Content]], *, as_lists: bool
) -> list[dict[str, Any]]:
    """The rows with ``neg_text`` and ``neg_image_path``: lists, or one text each, empty where there is none."""
    found = []
    for row, mined in zip(rows, negatives):
        texts, paths = [n.text for n in mined], [n.image_path for n in mined]
        if as_lists:
            columns: dict[str, Any] = {"neg_text": texts, "neg_image_path": paths}
        else:
            columns = {"neg_text": texts[0] if texts else "", "neg_image_path": paths[0] if paths else ""}
        found.append(row | columns)
    return found


def write_pairs_file(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as ``.parquet`` or ``.jsonl``; the file appears when it is whole.

    Raises:
        ValueError: for another suffix.
    """
    path = Path(path)
    check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = unfinished(path)
    if path.suffix == ".parquet":
        # Not from_pylist, which takes the first row's columns for those of all.
        names = dict.fromkeys(name for row in rows for name in row)
        pyarrow.parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in names}), work)
    else:
        work.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    work.replace(path)
