"""JSONL files to rows, with every row that cannot serve counted under a reason.

The rules of stage ``bridge`` live here, too: block B must be text worth reconstructing, so text-to-image rows are
turned round, and rows whose target is an image or a constant phrase are left out, and both are counted.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

IMAGE_TOKEN = "<|image_1|>"
"""Where the picture goes in a text of MMEB-train; at most once, first of all pictures."""

MAX_BAD_SHARE = 0.05
"""A file with more malformed rows than this is refused: it is probably not the file that was meant."""

_CONSTANT_TARGETS = frozenset({"", "represent the given image", "represent the given image and the related text"})
_IMAGE_COLUMNS = ("qry_image_path", "pos_image_path")


@dataclass(frozen=True, slots=True)
class CaptionRow:
    """A picture and its caption."""

    row_id: str
    image_path: str
    caption: str
    concept: str = ""


@dataclass(frozen=True, slots=True)
class Content:
    """One side of a pair: text in which ``<|image_1|>`` marks the picture's place; empty path, no picture."""

    text: str
    image_path: str = ""


@dataclass(frozen=True, slots=True)
class PairRow:
    """A query and its target, as in MMEB-train.

    Args:
        row_id: name for seeds and messages.
        query, target: the two sides.
        negatives: explicit hard negatives of the query, any number; see ``checked_negatives``.
        source: name of the data set that the row comes from; empty where nobody said.
    """

    row_id: str
    query: Content
    target: Content
    negatives: tuple[Content, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class RowSet:
    """The rows of one file that can serve, and why others cannot.

    Args:
        rows: in file order.
        dropped: rows left out on purpose or as malformed, by reason.
        flipped: text-to-image rows that were turned round.
    """

    rows: list
    dropped: dict[str, int]
    flipped: int = 0


class BadRow(ValueError):
    """A malformed row; ``str()`` is the reason under which it is counted."""


def read_captions(path: str | Path) -> RowSet:
    """Read ``warmup.jsonl`` or ``eval_*.jsonl``: ``{"id", "image_path", "caption"[, "concept"]}``.

    Raises:
        ValueError: if the file is missing or empty, or more than ``MAX_BAD_SHARE`` of its rows are malformed.
    """
    return _read(Path(path), _caption_row)


def read_pairs(path: str | Path, *, with_negatives: bool = False) -> RowSet:
    """Read ``contrastive.jsonl``: ``{"id", "qry", "qry_image_path", "pos_text", "pos_image_path"}``.

    Args:
        path: of the file. A column ``source``, optional, names the data set that a row comes from.
        with_negatives: also read ``neg_text`` and ``neg_image_path``, each a string or a list of strings.

    Raises:
        ValueError: as ``read_captions``.
    """
    return _read(Path(path), functools.partial(_pair_row, with_negatives=with_negatives))


def read_bridge_pairs(path: str | Path) -> RowSet:
    """Read ``bridge.jsonl`` (columns as ``read_pairs``) and keep what can be reconstructed: block B is plain text.

    Text-to-image rows are flipped: the picture and its prompt become block A, the query block B. Rows from image to
    image (grounding and composed retrieval among them), and rows whose target is empty or a constant phrase, are
    dropped and counted.

    Raises:
        ValueError: as ``read_captions``, or if no row is left.
    """
    pairs = _read(Path(path), _pair_row)
    kept: list[PairRow] = []
    dropped: Counter[str] = Counter(pairs.dropped)
    flipped = 0
    for pair in pairs.rows:
        if pair.query.image_path and pair.target.image_path:
            dropped["image_to_image"] += 1
            continue
        flip = bool(pair.target.image_path)
        block_a, block_b = (pair.target, pair.query) if flip else (pair.query, pair.target)
        text = _plain(block_b.text)
        if text.rstrip(".").lower() in _CONSTANT_TARGETS:
            dropped["constant_target"] += 1
            continue
        flipped += flip
        kept.append(PairRow(pair.row_id, block_a, Content(text), source=pair.source))
    if not kept:
        raise ValueError(f"{path} has no row whose target carries text: all were dropped ({dict(dropped)})")
    return RowSet(kept, dict(dropped), flipped)


def _plain(text: str) -> str:
    return text.replace(IMAGE_TOKEN, " ").strip()


def _read(path: Path, parse: Callable[[dict, str], object]) -> RowSet:
    rows: list = []
    bad: Counter[str] = Counter()
    first_bad = ""
    for number, line in _lines(path):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise BadRow("not_an_object")
            rows.append(parse(record, f"{path.stem}:{number}"))
        except (BadRow, json.JSONDecodeError) as error:
            reason = str(error) if isinstance(error, BadRow) else "not_json"
            first_bad = first_bad or f"line {number}: {reason}"
            bad[reason] += 1
    total = len(rows) + bad.total()
    if not rows or bad.total() > MAX_BAD_SHARE * total:
        raise ValueError(
            f"{path}: {bad.total()} of {total} rows are malformed ({dict(bad)}; first: {first_bad or 'none'}), at most "
            f"{MAX_BAD_SHARE:.0%} may be, and one row at least must be left: see docs/data.md for the columns"
        )
    return RowSet(rows, dict(bad))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): data.path must name its folder") from error
    with file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason}): write it anew as UTF-8") from error


def _text(record: dict, column: str, *, required: bool = True) -> str:
    value = record.get(column)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{column}_missing" if value is None else f"{column}_not_text")
    return value


def _row_id(record: dict, default: str) -> str:
    value = record.get("id", default)
    if not isinstance(value, (str, int)):
        raise BadRow("id_not_text")
    return str(value)


def _caption_row(record: dict, default_id: str) -> CaptionRow:
    row = CaptionRow(
        _row_id(record, default_id),
        _text(record, "image_path"),
        _text(record, "caption").strip(),
        _text(record, "concept", required=False),
    )
    if not row.image_path:
        raise BadRow("image_path_empty")
    if not row.caption:
        raise BadRow("caption_empty")
    return row


def _pair_row(record: dict, default_id: str, *, with_negatives: bool = False) -> PairRow:
    query_path, target_path = (_text(record, column, required=False) for column in _IMAGE_COLUMNS)
    query = checked_content(_text(record, "qry"), query_path)
    target = checked_content(_text(record, "pos_text"), target_path)
    negatives: tuple[Content, ...] = ()
    if with_negatives:
        negatives = checked_negatives(record.get("neg_text"), record.get("neg_image_path"))
    source = _text(record, "source", required=False)
    return PairRow(_row_id(record, default_id), query, target, negatives, source)


def checked_negatives(texts: object, image_paths: object) -> tuple[Content, ...]:
    """Hard negatives from MMEB-train's columns ``neg_text`` and ``neg_image_path``.

    Args:
        texts, image_paths: each a string, a list of strings, or None. Two lists go together entry by entry; a column
            that is missing or empty goes with every entry of the other. An entry with neither text nor picture is
            none: rows without a negative carry empty strings.

    Raises:
        BadRow: for columns that are neither, lists of different lengths, or an entry that ``checked_content`` refuses.
    """
    columns = [_strings(column, name) for column, name in ((texts, "neg_text"), (image_paths, "neg_image_path"))]
    length = max(len(column) for column in columns)
    columns = [[""] * length if column == [""] else column for column in columns]
    if any(len(column) != length for column in columns):
        raise BadRow("neg_columns_differ_in_length")
    try:
        return tuple(checked_content(text, path) for text, path in zip(*columns) if _plain(text) or path)
    except BadRow as error:
        raise BadRow(f"neg_{error}") from error


def _strings(value: object, column: str) -> list[str]:
    """A column as a list; what is missing or empty becomes one empty string."""
    entries = value if isinstance(value, list) else [value]
    entries = ["" if entry is None else entry for entry in entries] or [""]
    if not all(isinstance(entry, str) for entry in entries):
        raise BadRow(f"{column}_not_text")
    return entries


def checked_content(text: str, image_path: str) -> Content:
    """One side of a pair, with its placeholder and its path in agreement.

    Raises:
        BadRow: for a picture without a place in the text, more than one place, or neither text nor picture.
    """
    places = text.count(IMAGE_TOKEN)
    if not image_path:
        text = _plain(text) if places else text
        if not text.strip():
            raise BadRow("neither_text_nor_image")
        return Content(text)
    if places != 1:
        raise BadRow("image_without_placeholder" if places == 0 else "several_placeholders")
    return Content(text, image_path)
