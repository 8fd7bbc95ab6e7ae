"""Records to rows, with every row that cannot serve counted under a reason.

The rules of stage ``bridge`` live here, too: block B must be text worth reconstructing, so text-to-image rows are
turned round, and rows whose target is an image or a constant phrase are left out, and both are counted.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_cocoa.data.mmeb_train import is_constant_target, without_instruction
from megatron_cocoa.data.readers import BadRow, Record, jsonl_records
from megatron_cocoa.data.row_parsing import caption_or_pair, pair_row, plain
from megatron_cocoa.data.row_store import RowStore
from megatron_cocoa.data.rows import CaptionRow, Content, PairRow, RowSet

OnDrop = Callable[[str, str], None]

MAX_BAD_SHARE = 0.05
"""A file with more malformed rows than this is refused: it is probably not the file that was meant."""


def read_captions(path: str | Path) -> RowSet:
    """Read ``warmup.jsonl`` or ``eval_*.jsonl``: ``{"id", "image_path", "caption"[, "concept"]}``.

    Raises:
        ValueError: if the file is missing or empty, or more than ``MAX_BAD_SHARE`` of its rows are malformed.
    """
    return captions_from(jsonl_records(path), str(path))


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
    rows, flipped = RowStore(), 0
    dropped = _Dropped(on_drop)
    parsed = _parse(records, name, caption_or_pair, dropped)
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
    return _parse(records, name, functools.partial(pair_row, with_negatives=with_negatives), _Dropped(on_drop))


def bridge_pairs_from(records: Iterable[Record], name: str, *, on_drop: OnDrop | None = None) -> RowSet:
    """Rows of stage ``bridge``: of the pairs those that can be reconstructed, block B being plain text.

    Text-to-image rows are flipped: the picture and its prompt become block A, the query block B, without the
    instruction of a published text-to-image subset. Rows from image to image (grounding and composed retrieval among
    them), and rows whose target is empty or a constant phrase, are dropped and counted.

    Raises:
        ValueError: as ``captions_from``.
    """
    dropped = _Dropped(on_drop)
    pairs = _parse(records, name, pair_row, dropped)
    kept = RowStore()
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
    rows = RowStore()
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
