"""Records to rows, with every row that cannot serve counted under a reason.

The rules of stage ``bridge`` live here, too: block B must be text worth reconstructing, so text-to-image rows are
turned round, and rows whose target is an image or a constant phrase are left out, and both are counted.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from megatron_cocoa.data.mmeb_train import is_constant_target, without_instruction
from megatron_cocoa.data.readers import BadRow, Record, jsonl_records
from megatron_cocoa.data.row_parsing import caption_or_pair, pair_row, plain
from megatron_cocoa.data.row_store import RowStore
from megatron_cocoa.data.rows import CaptionRow, Content, PairRow, RowSet

Row = TypeVar("Row")
OnDrop = Callable[[str, str], None]

MAX_BAD_SHARE = 0.05
"""A file with more malformed rows than this is refused: it is probably not the file that was meant."""


class Tally:
    """What becomes of records that give no row, or another one than they say.

    Args:
        on_drop: called with the name of each row that is left out, and the reason.

    Attributes:
        dropped: rows left out on purpose or as malformed, by reason.
        flipped: text-to-image rows that were turned round.
    """

    def __init__(self, on_drop: OnDrop | None = None) -> None:
        self.dropped: Counter[str] = Counter()
        self.flipped = 0
        self._on_drop = on_drop

    def drop(self, row_id: str, reason: str) -> None:
        """Count a row that is left out."""
        self.dropped[reason] += 1
        if self._on_drop is not None:
            self._on_drop(row_id, reason)


Parser = Callable[[Iterable[Record], str, Tally], Iterator[CaptionRow] | Iterator[PairRow]]


def read_captions(path: str | Path) -> RowSet:
    """Read ``warmup.jsonl`` or ``eval_*.jsonl``: ``{"id", "image_path", "caption"[, "concept"]}``.

    Raises:
        ValueError: if the file is missing or empty, or more than ``MAX_BAD_SHARE`` of its rows are malformed.
    """
    return read_rows(captions_from, jsonl_records(path), str(path))


def read_rows(parser: Parser, records: Iterable[Record], name: str) -> RowSet:
    """All rows that ``parser``, one of the three below, makes of ``records``.

    Raises:
        ValueError: as ``parser``.
    """
    tally = Tally()
    rows = RowStore(parser(records, name, tally))
    return RowSet(rows, dict(tally.dropped), tally.flipped)


def captions_from(records: Iterable[Record], name: str, tally: Tally) -> Iterator[CaptionRow]:
    """Rows of stage ``warmup``: a picture and its caption.

    A record with MMEB-train's columns serves, too, where one side is a single picture and the other is text alone: the
    text is the caption, without the instruction of a published text-to-image subset. What else it may be is counted.

    Args:
        records: default names and records, malformed ones among them.
        name: of the source, for messages.
        tally: counts what is left out.

    Raises:
        ValueError: after the last row, if there was none, or more than ``MAX_BAD_SHARE`` of the records are malformed.
    """
    found = False
    for row in _parsed(records, name, caption_or_pair, tally):
        if isinstance(row, PairRow):
            row = _as_caption(row, tally)
        if row is not None:
            found = True
            yield row
    if not found:
        raise ValueError(f"{name} has no row of one picture and its text: all were dropped ({dict(tally.dropped)})")


def pairs_from(
    records: Iterable[Record], name: str, tally: Tally, *, with_negatives: bool = False
) -> Iterator[PairRow]:
    """Rows of stage ``contrastive``. A record of a picture and a caption becomes picture to caption.

    Args:
        records, name, tally: as in ``captions_from``.
        with_negatives: also read ``neg_text`` and ``neg_image_path``; else they are ignored.

    Raises:
        ValueError: as ``captions_from``.
    """
    return _parsed(records, name, functools.partial(pair_row, with_negatives=with_negatives), tally)


def bridge_pairs_from(records: Iterable[Record], name: str, tally: Tally) -> Iterator[PairRow]:
    """Rows of stage ``bridge``: of the pairs those that can be reconstructed, block B being plain text.

    Text-to-image rows are flipped: the picture and its prompt become block A, the query block B, without the
    instruction of a published text-to-image subset. Rows from image to image (grounding and composed retrieval among
    them), and rows whose target is empty or a constant phrase, are dropped and counted.

    Raises:
        ValueError: as ``captions_from``.
    """
    found = False
    for pair in _parsed(records, name, pair_row, tally):
        if pair.query.images and pair.target.images:
            tally.drop(pair.row_id, "image_to_image")
            continue
        flip = bool(pair.target.images)
        block_a, block_b = (pair.target, pair.query) if flip else (pair.query, pair.target)
        text = plain(block_b.text)
        text = without_instruction(text) if flip else text
        if is_constant_target(text):
            tally.drop(pair.row_id, "constant_target")
            continue
        tally.flipped += flip
        found = True
        yield PairRow(pair.row_id, block_a, Content(text), source=pair.source)
    if not found:
        raise ValueError(f"{name} has no row whose target carries text: all were dropped ({dict(tally.dropped)})")


def _as_caption(pair: PairRow, tally: Tally) -> CaptionRow | None:
    query, target = pair.query, pair.target
    if len(query.images) + len(target.images) != 1:
        tally.drop(pair.row_id, "several_pictures" if query.images else "no_picture")
        return None
    flip = bool(target.images)
    picture, words = (target, query) if flip else (query, target)
    caption = without_instruction(plain(words.text))
    if is_constant_target(caption):
        tally.drop(pair.row_id, "constant_target")
        return None
    tally.flipped += flip
    return CaptionRow(pair.row_id, picture.image_path, caption, source=pair.source)


def _parsed(records: Iterable[Record], name: str, parse: Callable[[dict, str], Row], tally: Tally) -> Iterator[Row]:
    """Each record's row; refuses the source behind the last one if too many have none."""
    number, malformed, first_bad = 0, Counter(), ""
    for default_id, record in records:
        try:
            if isinstance(record, BadRow):
                raise record
            row = parse(record, default_id)
        except BadRow as error:
            first_bad = first_bad or f"{default_id}: {error}"
            malformed[str(error)] += 1
            tally.drop(default_id, str(error))
        else:
            number += 1
            yield row
    total = number + malformed.total()
    if not number or malformed.total() > MAX_BAD_SHARE * total:
        raise ValueError(
            f"{name}: {malformed.total()} of {total} rows are malformed ({dict(malformed)}; first: "
            f"{first_bad or 'none'}), at most {MAX_BAD_SHARE:.0%} may be, and one row at least must be left: see "
            f"docs/data.md for the columns"
        )
