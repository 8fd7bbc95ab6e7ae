"""What a stage trains on, row by row, before anything is read of its pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cocoa.data.stored import PictureRef

IMAGE_TOKEN = "<|image_1|>"
"""Where the picture goes in a text of MMEB-train; a second one goes where ``<|image_2|>`` stands, and so on."""

PLACEHOLDER = re.compile(r"<\|image_(\d+)\|>")


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
        rows: a ``RowStore``, in the order of the files.
        dropped: rows left out on purpose or as malformed, by reason.
        flipped: text-to-image rows that were turned round.
        parts: ``(source, number of rows, weight)`` in the order of ``rows``, where there are several sources.
    """

    rows: Sequence[CaptionRow] | Sequence[PairRow]
    dropped: dict[str, int]
    flipped: int = 0
    parts: tuple[tuple[str, int, float | None], ...] = ()
