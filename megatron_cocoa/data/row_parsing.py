"""One record to one row: which columns it needs, and every way in which it may be malformed."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_cocoa.data.readers import BadRow
from megatron_cocoa.data.rows import IMAGE_TOKEN, PLACEHOLDER, CaptionRow, Content, PairRow
from megatron_cocoa.data.stored import PictureRef, StoredPicture

_IMAGE_COLUMNS = ("qry_image_path", "pos_image_path")


def caption_or_pair(record: dict, default_id: str) -> CaptionRow | PairRow:
    """A row of stage ``warmup``, or the pair that a record with MMEB-train's columns is.

    Raises:
        BadRow: for a record that is neither.
    """
    is_pair = "qry" in record and "caption" not in record
    return pair_row(record, default_id) if is_pair else _caption_row(record, default_id)


def pair_row(record: dict, default_id: str, *, with_negatives: bool = False) -> PairRow:
    """A query and its target; a record of a picture and a caption becomes picture to caption.

    Args:
        record: column values.
        default_id: its name where it has none.
        with_negatives: also read the columns of hard negatives.

    Raises:
        BadRow: for a column that is missing or not what it should be.
    """
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


def checked_content(text: str, images: PictureRef | Sequence[PictureRef]) -> Content:
    """One side of a pair, with its placeholders and its pictures in agreement.

    Of a text without pictures left-over marks go (``without_marks``). Pictures without any text stand in their order.

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
        text = without_marks(text)
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


def without_marks(text: str) -> str:
    """``text`` without the marks of pictures, and otherwise as it stands: a prompt keeps the line ends around them.

    MMEB's WebQA has such prompts. MoCa's code takes the mark alone out; VLM2Vec's leaves a lone image token there.
    """
    return PLACEHOLDER.sub("", text)


def plain(text: str) -> str:
    """The words of ``text``: without the marks of pictures, nor blanks around what is left."""
    return PLACEHOLDER.sub(" ", text).strip()


def half_surrogate(text: str) -> int | None:
    """Where the first half of a surrogate pair stands alone; None in a proper text.

    JSON can write one, and a file name that is no UTF-8 becomes some; UTF-8 and the tokenizer cannot take it.
    """
    # Encoding finds it in a fiftieth of the time that a look at each character takes.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _text(record: dict, column: str, *, required: bool = True) -> str:
    value = record.get(column)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{column}_missing" if value is None else f"{column}_not_text")
    _check_unicode(value, column)
    return value


def _check_unicode(value: object, column: str) -> None:
    if isinstance(value, str) and half_surrogate(value) is not None:
        raise BadRow(f"{column}_not_unicode")


def _row_id(record: dict, default: str) -> str:
    value = record.get("id", default)
    if not isinstance(value, (str, int)):
        raise BadRow("id_not_text")
    _check_unicode(value, "id")
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


def _caption_row(record: dict, default_id: str) -> CaptionRow:
    pictures = _images(record, "image_path")
    if len(pictures) > 1:
        raise BadRow("image_path_several")
    if "image_path" not in record:
        raise BadRow("image_path_missing")
    row = CaptionRow(
        _row_id(record, default_id),
        pictures[0] if pictures else "",
        plain(_text(record, "caption")),
        _text(record, "concept", required=False),
        _text(record, "source", required=False),
    )
    if not row.image_path:
        raise BadRow("image_path_empty")
    if not row.caption:
        raise BadRow("caption_empty")
    return row


def _entries(value: object, column: str, kinds: type | tuple[type, ...]) -> list:
    """A column as a list; what is missing or empty becomes one empty string."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    entries = ["" if entry is None else entry for entry in entries] or [""]
    if not all(isinstance(entry, kinds) for entry in entries):
        raise BadRow(f"{column}_not_text")
    for entry in entries:
        _check_unicode(entry, column)
    return entries
