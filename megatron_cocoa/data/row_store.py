"""Millions of rows without millions of Python objects: one buffer of bytes, and where each row begins in it.

A row of texts and paths takes about a kilobyte as objects, and since looking at an object counts a reference to it,
each forked worker soon has a copy of them all. The buffer takes what the texts take, and stays shared.
"""

from __future__ import annotations

import hashlib
import marshal
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from megatron_cocoa.data.rows import CaptionRow, Content, PairRow
from megatron_cocoa.data.stored import PictureRef, StoredPicture

Row = CaptionRow | PairRow

_FORMAT = 2
"""Of ``marshal``: the last one without references between values, which single rows hardly have: equal rows are equal
bytes. No row is ever on disk in it, but digests are."""


class RowStore(Sequence):
    """Rows in order; ``append`` until all are there, then look at them like a list's.

    A row is made anew each time it is asked for. What many rows share (sources, concepts, folders of pictures) is held
    once. Pickled, a store is two arrays and what rows share: ranks of a host map the arrays (``parallel/host.py``).
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._buffer: bytearray | memoryview = bytearray()
        self._ends = _Numbers()
        self._shared: list[object] = []
        self._place: dict[object, int] | None = {}
        self.extend(rows)

    def append(self, row: Row) -> None:
        """Add a row at the end; not to a store that was unpickled."""
        assert self._place is not None
        if isinstance(row, PairRow):
            negatives = tuple(map(self._packed, row.negatives))
            fields: tuple = (
                row.row_id, self._packed(row.query), self._packed(row.target), negatives, self._share(row.source),
            )  # fmt: skip
        else:
            picture = self._packed_picture(row.image_path)
            fields = row.row_id, picture, row.caption, self._share(row.concept), self._share(row.source), None
        self._buffer += marshal.dumps(fields, _FORMAT)
        self._ends.append(len(self._buffer))

    def extend(self, rows: Iterable[Row]) -> None:
        """Add rows at the end, each as it comes."""
        for row in rows:
            self.append(row)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows together, but for what they share."""
        return len(self._buffer) + self._ends.nbytes

    def digest(self) -> str:
        """Equal for equal rows in equal order, hexadecimal; a fiftieth of the time that it takes to fill the store.

        The folders that pictures lie under do not count: they may move between two starts of a run.
        """
        found = hashlib.blake2b(self._buffer, digest_size=16)
        found.update(repr([value if isinstance(value, str) else value[1:] for value in self._shared]).encode("utf-8"))
        return found.hexdigest()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self._at(index) for index in range(*place.indices(len(self)))]
        index = int(place) + (len(self) if place < 0 else 0)
        if not 0 <= index < len(self):
            raise IndexError(f"row {place} of {len(self)}")
        return self._at(index)

    def __iter__(self) -> Iterator[Row]:
        return map(self._at, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (RowStore, list)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None

    def __getstate__(self) -> dict:
        return {"buffer": np.asarray(self._buffer, dtype=np.uint8), "ends": self._ends.values, "shared": self._shared}

    def __setstate__(self, state: dict) -> None:
        self._buffer, self._ends, self._shared = memoryview(state["buffer"]), _Numbers(state["ends"]), state["shared"]
        self._place = None

    def _at(self, index: int) -> Row:
        start = self._ends[index - 1] if index else 0
        fields = marshal.loads(memoryview(self._buffer)[start : self._ends[index]])
        if len(fields) == 5:
            row_id, query, target, negatives, source = fields
            sides = self._content(query), self._content(target), tuple(map(self._content, negatives))
            return PairRow(row_id, *sides, self._shared[source])
        row_id, picture, caption, concept, source, _ = fields
        return CaptionRow(row_id, self._picture(picture), caption, self._shared[concept], self._shared[source])

    def _share(self, value: object) -> int:
        if value not in self._place:
            self._place[value] = len(self._shared)
            self._shared.append(value)
        return self._place[value]

    def _packed(self, content: Content) -> tuple:
        return content.text, *map(self._packed_picture, content.images)

    def _content(self, packed: tuple) -> Content:
        text, *pictures = packed
        images = tuple(map(self._picture, pictures))
        return Content(text, images[0], images[1:]) if images else Content(text)

    def _packed_picture(self, picture: PictureRef) -> str | tuple:
        if isinstance(picture, str):
            return picture
        return self._share((picture.root, picture.kind, picture.column)), picture.path, *picture.place

    def _picture(self, packed: str | tuple) -> PictureRef:
        if isinstance(packed, str):
            return packed
        shared, path, *place = packed
        root, kind, column = self._shared[shared]
        return StoredPicture(root, path, kind, tuple(place), column)


_NONE = np.zeros(0, dtype=np.int64)


class _Numbers:
    """Ascending numbers in an array that grows by doubling; int64, eight bytes each and no objects."""

    def __init__(self, values: np.ndarray = _NONE) -> None:
        self._values = values
        self._size = values.size

    def append(self, value: int) -> None:
        if self._size == self._values.size:
            self._values = np.concatenate([self._values, np.zeros(max(16, self._size), dtype=np.int64)])
        self._values[self._size] = value
        self._size += 1

    def __getitem__(self, place: int) -> int:
        return int(self._values[place])

    def __len__(self) -> int:
        return self._size

    @property
    def values(self) -> np.ndarray:
        return self._values[: self._size]

    @property
    def nbytes(self) -> int:
        return 8 * self._size
