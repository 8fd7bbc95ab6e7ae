"""Records to rows, with every row that cannot serve counted under a reason.

The rules of stage ``bridge`` live here, too: block B must be text worth reconstructing, so text-to-image rows are
turned round, and rows whose target is an image or a constant phrase are left out, and both are counted.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cocoa.data.mmeb_train import is_constant_target, without_instruction
from megatron_cocoa.data.readers import BadRow, Record, jsonl_records
from megatron_cocoa.data.stored import PictureRef, StoredPicture

IMAGE_TOKEN = "<|image_1|>"
"""Where the picture goes in a text of MMEB-train; a second one goes where ``<|image_2|>`` stands, and so on."""

OnDrop = Callable[[str, str], None]

PLACEHOLDER = re.compile(r"<\|image_(\d+)\|>")

MAX_BAD_SHARE = 0.05
"""A file with more malformed rows than this is refused: it is probably not the file that was meant."""

_IMAGE_COLUMNS = ("qry_image_path", "pos_image_path")


@dataclass(frozen=True, slots=True)
class CaptionRow:
    """A picture and its caption."""

    row_id: str
    image_path: PictureRef
    caption: str
    concept: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Content:
    """One side of a pair: text in which ``<|image_1|>`` marks the picture's place.

    Args:
        text: as it stands in the data.
        image_path: the picture; empty for none.
        further_images: those of ``<|image_2|>`` and on.
    """

    text: str
    image_path: PictureRef = ""
    further_images: tuple[PictureRef, ...] = ()

    @property
    def images(self) -> tuple[PictureRef, ...]:
        """All pictures by number; the text may show them in another order."""
        return (self.image_path, *self.further_images) if self.image_path else ()


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
    """The rows of a source, or of several, that can serve, and why others cannot.

    Args:
        rows: in the order of the files.
        dropped: rows left out on purpose or as malformed, by reason.
        flipped: text-to-image rows that were turned round.
        parts: ``(source, number of rows, weight)`` in the order of ``rows``, where there are several sources.
    """

    rows: list
    dropped: dict[str, int]
    flipped: int = 0
    parts: tuple[tuple[str, int, float | None], ...] = ()


def read_captions(path: str | Path) -> RowSet:
    """Read ``warmup.jsonl`` or ``eval_*.jsonl``: ``{"id", "image_path", "caption"[, "concept"]}``.

    Raises:
        ValueError: if the file is missing or empty, or more than ``MAX_BAD_SHARE`` of its rows are malformed.
    """
    return captions_from(jsonl_records(path), str(path))


def read_pairs(path: str | Path, *, with_negatives: bool = False) -> RowSet:
    """Read ``contrastive.jsonl``: ``{"id", "qry", "qry_image_path", "pos_text", "pos_image_path"}``.

    Args:
        path: of the file. A column ``source``, optional, names the data set that a row comes from.
        with_negatives: also read ``neg_text`` and ``neg_image_path``, each a string or a list of strings.

    Raises:
        ValueError: as ``read_captions``.
    """
    return pairs_from(jsonl_records(path), str(path), with_negatives=with_negatives)


def read_bridge_pairs(path: str | Path) -> RowSet:
    """Read ``bridge.jsonl`` (columns as ``read_pairs``) and keep what ``bridge_pairs_from`` keeps.

    Raises:
        ValueError: as ``read_captions``, or if no row is left.
    """
    return bridge_pairs_from(jsonl_records(path), str(path))


def captions_from(records: Iterable[Record], name: str, *, on_drop: OnDrop | None = None) -> RowSet:
    """Rows of stage ``warmup``: a picture and its caption.

    A record with MMEB-train's columns serves, too, where one side is a single picture and the other is text alone: the
    text is the caption, without the instruction of a published text-to-image subset. What else it may be is counted.

    Args:
        records: default names and records, malformed ones among them.
        name: of the source, for messages.
        on_drop: called with the name of each row that is left out, and the reason.

    Raises:
        ValueError: if no row is left, or more than ``MAX_BAD_SHARE`` are malformed.
    """
    rows, flipped = [], 0
    dropped = _Dropped(on_drop)
    parsed = _parse(records, name, _caption_or_pair, dropped)
    for row in parsed.rows:
        if isinstance(row, CaptionRow):
            rows.append(row)
            continue
        query, target = row.query, row.target
        if len(query.images) + len(target.images) != 1:
            dropped.add(row.row_id, "several_pictures" if query.images else "no_picture")
            continue
        flip = bool(target.images)
        picture, words = (target, query) if flip else (query, target)
        caption = without_instruction(plain(words.text))
        if is_constant_target(caption):
            dropped.add(row.row_id, "constant_target")
            continue
        flipped += flip
        rows.append(CaptionRow(row.row_id, picture.image_path, caption, source=row.source))
    if not rows:
        raise ValueError(f"{name} has no row of one picture and its text: all were dropped ({dict(dropped)})")
    return RowSet(rows, dict(dropped), flipped)


def pairs_from(
    records: Iterable[Record], name: str, *, with_negatives: bool = False, on_drop: OnDrop | None = None
) -> RowSet:
    """Rows of stage ``contrastive``. A record of a picture and a caption becomes picture to caption.

    Args:
        records, name, on_drop: as in ``captions_from``.
        with_negatives: also read ``neg_text`` and ``neg_image_path``; else they are ignored.

    Raises:
        ValueError: as ``captions_from``.
    """
    return _parse(records, name, functools.partial(_pair_row, with_negatives=with_negatives), _Dropped(on_drop))


def bridge_pairs_from(records: Iterable[Record], name: str, *, on_drop: OnDrop | None = None) -> RowSet:
    """Rows of stage ``bridge``: of the pairs those that can be reconstructed, block B being plain text.

    Text-to-image rows are flipped: the picture and its prompt become block A, the query block B, without the
    instruction of a published text-to-image subset. Rows from image to image (grounding and composed retrieval among
    them), and rows whose target is empty or a constant phrase, are dropped and counted.

    Raises:
        ValueError: as ``captions_from``.
    """
    dropped = _Dropped(on_drop)
    pairs = _parse(records, name, _pair_row, dropped)
    kept: list[PairRow] = []
    flipped = 0
    for pair in pairs.rows:
        if pair.query.images and pair.target.images:
            dropped.add(pair.row_id, "image_to_image")
            continue
        flip = bool(pair.target.images)
        block_a, block_b = (pair.target, pair.query) if flip else (pair.query, pair.target)
        text = plain(block_b.text)
        text = without_instruction(text) if flip else text
        if is_constant_target(text):
            dropped.add(pair.row_id, "constant_target")
            continue
        flipped += flip
        kept.append(PairRow(pair.row_id, block_a, Content(text), source=pair.source))
    if not kept:
        raise ValueError(f"{name} has no row whose target carries text: all were dropped ({dict(dropped)})")
    return RowSet(kept, dict(dropped), flipped)


def plain(text: str) -> str:
    """``text`` without the marks of pictures."""
    return PLACEHOLDER.sub(" ", text).strip()


class _Dropped(Counter):
    """Rows left out, by reason."""

    def __init__(self, on_drop: OnDrop | None) -> None:
        super().__init__()
        self._on_drop = on_drop

    def add(self, row_id: str, reason: str) -> None:
        self[reason] += 1
        if self._on_drop is not None:
            self._on_drop(row_id, reason)


def _parse(records: Iterable[Record], name: str, parse: Callable[[dict, str], object], bad: _Dropped) -> RowSet:
    rows: list = []
    first_bad = ""
    for default_id, record in records:
        try:
            if isinstance(record, BadRow):
                raise record
            rows.append(parse(record, default_id))
        except BadRow as error:
            first_bad = first_bad or f"{default_id}: {error}"
            bad.add(default_id, str(error))
    total = len(rows) + bad.total()
    if not rows or bad.total() > MAX_BAD_SHARE * total:
        raise ValueError(
            f"{name}: {bad.total()} of {total} rows are malformed ({dict(bad)}; first: {first_bad or 'none'}), at most "
            f"{MAX_BAD_SHARE:.0%} may be, and one row at least must be left: see docs/data.md for the columns"
        )
    return RowSet(rows, dict(bad))


def _text(record: dict, column: str, *, required: bool = True) -> str:
    value = record.get(column)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{column}_missing" if value is None else f"{column}_not_text")
    _check_unicode(value, column)
    return value


def _check_unicode(value: object, column: str) -> None:
    """Refuse half of a surrogate pair: JSON can write it, UTF-8 and the tokenizer cannot."""
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRow(f"{column}_not_unicode")


def _row_id(record: dict, default: str) -> str:
    value = record.get("id", default)
    if not isinstance(value, (str, int)):
        raise BadRow("id_not_text")
    return str(value)


def _images(record: dict, column: str) -> tuple[PictureRef, ...]:
    """The pictures of a column: none, one, or a list of them."""
    value = record.get(column)
    values = value if isinstance(value, (list, tuple)) else [value]
    found = [item for item in values if item not in (None, "")]
    if any(not isinstance(item, (str, StoredPicture)) for item in found):
        raise BadRow(f"{column}_not_text")
    if len(values) > 1 and len(found) != len(values):
        raise BadRow(f"{column}_has_gaps")
    return tuple(found)


def _caption_or_pair(record: dict, default_id: str) -> CaptionRow | PairRow:
    is_pair = "qry" in record and "caption" not in record
    return _pair_row(record, default_id) if is_pair else _caption_row(record, default_id)


def _caption_row(record: dict, default_id: str) -> CaptionRow:
    pictures = _images(record, "image_path")
    if len(pictures) > 1:
        raise BadRow("image_path_several")
    if "image_path" not in record:
        raise BadRow("image_path_missing")
    row = CaptionRow(
        _row_id(record, default_id),
        pictures[0] if pictures else "",
        _text(record, "caption").strip(),
        _text(record, "concept", required=False),
        _text(record, "source", required=False),
    )
    if not row.image_path:
        raise BadRow("image_path_empty")
    if not row.caption:
        raise BadRow("caption_empty")
    return row


def _pair_row(record: dict, default_id: str, *, with_negatives: bool = False) -> PairRow:
    if "qry" not in record and "caption" in record:
        row = _caption_row(record, default_id)
        query, target, source = Content(IMAGE_TOKEN, row.image_path), Content(row.caption), row.source
    else:
        query_images, target_images = (_images(record, column) for column in _IMAGE_COLUMNS)
        query = checked_content(_text(record, "qry"), query_images)
        target = checked_content(_text(record, "pos_text"), target_images)
        source = _text(record, "source", required=False)
    negatives: tuple[Content, ...] = ()
    if with_negatives:
        negatives = checked_negatives(record.get("neg_text"), record.get("neg_image_path"))
    return PairRow(_row_id(record, default_id), query, target, negatives, source)


def checked_negatives(texts: object, images: object) -> tuple[Content, ...]:
    """Hard negatives from MMEB-train's columns ``neg_text`` and ``neg_image_path``.

    Args:
        texts, images: each one entry, a list of them, or None; texts are strings, images paths or references, one to
            an entry. Two lists go together entry by entry; a column that is missing or empty goes with every entry of
            the other. An entry with neither text nor picture is none: rows without a negative carry empty strings.

    Raises:
        BadRow: for columns that are neither, lists of different lengths, or an entry that ``checked_content`` refuses.
    """
    columns = [
        _entries(texts, "neg_text", str),
        _entries(images, "neg_image_path", (str, StoredPicture)),
    ]
    length = max(len(column) for column in columns)
    columns = [[""] * length if column == [""] else column for column in columns]
    if any(len(column) != length for column in columns):
        raise BadRow("neg_columns_differ_in_length")
    try:
        return tuple(checked_content(text, image) for text, image in zip(*columns) if plain(text) or image)
    except BadRow as error:
        raise BadRow(f"neg_{error}") from error


def _entries(value: object, column: str, kinds: type | tuple[type, ...]) -> list:
    """A column as a list; what is missing or empty becomes one empty string."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    entries = ["" if entry is None else entry for entry in entries] or [""]
    if not all(isinstance(entry, kinds) for entry in entries):
        raise BadRow(f"{column}_not_text")
    for entry in entries:
        _check_unicode(entry, column)
    return entries


def checked_content(text: str, images: PictureRef | Sequence[PictureRef]) -> Content:
    """One side of a pair, with its placeholders and its pictures in agreement.

    Marks that are left over in a text without pictures go. Pictures without any text stand in their order.

    Args:
        text: with ``<|image_1|>`` where the first picture goes, and so on.
        images: path of the picture, or all of them; empty for none.

    Raises:
        BadRow: for a picture without a place in the text, more places than one, places without a picture, or neither
            text nor picture.
    """
    pictures = (images,) if isinstance(images, (str, StoredPicture)) else tuple(images)
    pictures = tuple(picture for picture in pictures if picture)
    if not pictures:
        text = plain(text) if PLACEHOLDER.search(text) else text
        if not text.strip():
            raise BadRow("neither_text_nor_image")
        return Content(text)
    text = text if text.strip() else "".join(f"<|image_{number}|>" for number in range(1, len(pictures) + 1))
    places = [int(number) for number in PLACEHOLDER.findall(text)]
    if set(range(1, len(pictures) + 1)) - set(places):
        raise BadRow("image_without_placeholder")
    if len(set(places)) != len(places):
        raise BadRow("several_placeholders")
    if len(places) != len(pictures):
        raise BadRow("placeholder_without_image")
    return Content(text, pictures[0], pictures[1:])
