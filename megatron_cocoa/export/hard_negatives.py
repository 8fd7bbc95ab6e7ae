"""Hard negatives: for each training pair the nearest wrong targets, at a distance from what may well be right.

A target that is as near to the query as its own positive is more likely a second right answer than a hard wrong one
(NV-Retriever, arXiv 2407.15831). So a candidate must score below the positive by a margin, as a cosine or as a share of
the positive's own score (TopK-MarginPos and TopK-PercPos there). And what equals the positive, another positive of the
same query, or the query itself is no candidate at all: equal in content, whatever rows, prompts and file names say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from unicodedata import normalize

import numpy as np

from megatron_cocoa.data.row_parsing import plain
from megatron_cocoa.evaluation.metrics import TIE_TOLERANCE
from megatron_cocoa.export.nearest import Vectors, nearest

BLOCK_QUERIES = 4096
PASSED_OVER = ("own_positive", "other_positive", "is_the_query", "within_margin", "same_answer", "skipped_top")
"""Why a neighbour is not chosen, in the order in which it is asked."""
_REASONS = ("", *PASSED_OVER, "chosen")


class Content(NamedTuple):
    """One side of a pair, as in MMEB-train."""

    text: str
    image_path: str

    @property
    def words(self) -> str:
        """What makes two texts one: neither capitals, blanks, spellings in Unicode nor the marks of pictures do."""
        return " ".join(normalize("NFKC", plain(self.text)).casefold().split())


@dataclass(frozen=True)
class MiningOptions:
    """What counts as a hard negative.

    Args:
        num_negatives: per row, at most.
        margin: cosine by which a candidate must stay below the row's positive; what ties with that is within any.
        skip_top: nearest admissible candidates to pass over.
        depth: neighbours looked at per row.
        relative_margin: as ``margin``, in shares of the positive's own cosine; of the two the wider one counts.

    Raises:
        ValueError: if a number is out of range, or the depth cannot give as many.
    """

    num_negatives: int = 1
    margin: float = 0.05
    skip_top: int = 0
    depth: int = 200
    relative_margin: float = 0.0

    def __post_init__(self) -> None:
        if self.num_negatives < 1 or self.skip_top < 0 or not 0 <= self.margin <= 2:
            raise ValueError(
                f"num_negatives is {self.num_negatives} (1 or more), skip_top {self.skip_top} (0 or more), margin "
                f"{self.margin} (between 0 and 2)"
            )
        if not 0 <= self.relative_margin <= 1:
            raise ValueError(f"relative_margin is {self.relative_margin}: needed between 0 and 1, as 0.05 for 95%")
        if self.depth < self.num_negatives + self.skip_top:
            needed = f"num_negatives {self.num_negatives} + skip_top {self.skip_top}"
            raise ValueError(f"depth {self.depth} is below {needed}: raise it")


@dataclass
class Mined:
    """Negatives of each row, nearest first, and why neighbours were passed over.

    counts: ``chosen``, ``own_positive``, ``other_positive``, ``is_the_query``, ``within_margin`` (suspected false
        negatives), ``same_answer`` (as one that was taken or skipped before it), ``skipped_top``; and rows:
        ``full_rows``, ``short_rows`` (fewer than asked), ``empty_rows``.
    """

    negatives: list[list[Content]]
    scores: list[list[float]]
    counts: Counter[str] = field(default_factory=Counter)


def mine(
    queries: Sequence[Content],
    positives: Sequence[Content],
    query_vectors: Vectors,
    positive_vectors: Vectors,
    options: MiningOptions,
    *,
    same_pictures: Mapping[str, str] | None = None,
) -> Mined:
    """Find hard negatives among the positives of other rows.

    Args:
        queries, positives: of each row.
        query_vectors, positive_vectors: of each row; read block by block.
        options: what to take.
        same_pictures: one path for all pictures of one content, see ``same_pictures``; a path that is not in it is a
            picture of its own.

    Raises:
        ValueError: if the numbers of rows or the lengths of vectors differ.
    """
    shapes = {len(queries), len(positives), len(query_vectors), len(positive_vectors)}
    if len(shapes) != 1 or query_vectors.shape[1:] != positive_vectors.shape[1:]:
        raise ValueError(
            f"found {len(queries)} pairs, query vectors {tuple(query_vectors.shape)} and target vectors "
            f"{tuple(positive_vectors.shape)}: embed both sides of the very same file with one model"
        )
    known = _Answers(queries, positives, same_pictures or {})
    depth = min(options.depth, len(known.pool))
    mined = Mined([], [])
    for first, all_places, all_scores in nearest(query_vectors, positive_vectors, known.pool, depth):
        for start in range(0, len(all_places), BLOCK_QUERIES):
            places, scores = (found[start : start + BLOCK_QUERIES] for found in (all_places, all_scores))
            rows = slice(first + start, first + start + len(places))
            own = np.einsum("rh,rh->r", query_vectors[rows], positive_vectors[rows])
            # A copy of the positive that is not known as one scores the same but for rounding, and is as right.
            limits = own - np.maximum(max(options.margin, TIE_TOLERANCE), options.relative_margin * np.abs(own))
            reasons = known.refused(rows, places)
            reasons[(reasons == 0) & (scores > limits[:, None])] = _REASONS.index("within_margin")
            _choose(reasons, known.answers[known.pool][places], options)
            for row, (taken, score) in enumerate(zip(reasons == _REASONS.index("chosen"), scores)):
                mined.negatives.append([positives[known.pool[place]] for place in places[row, taken]])
                mined.scores.append(score[taken].tolist())
            counts = np.bincount(reasons[reasons >= 0]).tolist()
            mined.counts.update({name: count for name, count in zip(_REASONS, counts) if count})
    for found in mined.negatives:
        full = len(found) == options.num_negatives
        mined.counts["full_rows" if full else "short_rows" if found else "empty_rows"] += 1
    return mined


class _Answers:
    """Which targets are one answer, and which of them are right for a query, in numbers.

    pool: int64 ``(candidates,)``, the first row of each distinct target.
    answers: int64 ``(rows,)``, a number for the content of each row's target: its picture, else its words.
    """

    def __init__(
        self, queries: Sequence[Content], positives: Sequence[Content], same_pictures: Mapping[str, str]
    ) -> None:
        numbers: dict[tuple[str, ...], int] = {}
        pool: dict[tuple[str, str], int] = {}

        def picture(content: Content) -> str:
            return same_pictures.get(content.image_path, content.image_path)

        def answer(content: Content) -> int:
            # The picture is the answer, whichever prompt stands beside it.
            key = ("picture", picture(content)) if content.image_path else ("words", content.words)
            return numbers.setdefault(key, len(numbers))

        for row, content in enumerate(positives):
            pool.setdefault((content.text, picture(content)), row)
        self.pool = np.array(list(pool.values()), dtype=np.int64)
        self.answers, self._itself = (np.array([answer(c) for c in side]) for side in (positives, queries))
        keys = [("query", query.words, picture(query)) for query in queries]
        self._groups = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
        self._num = len(numbers)
        self._rights = np.unique(self._groups * self._num + self.answers)

    def refused(self, rows: slice, places: np.ndarray) -> np.ndarray:
        """int8 ``(queries, depth)``: why each place of the pool is no candidate of each row; 0 where it is one."""
        found = self.answers[self.pool[places]]
        keys = self._groups[rows, None] * self._num + found
        at = np.searchsorted(self._rights, keys)
        is_right = self._rights[np.minimum(at, len(self._rights) - 1)] == keys
        checks = [found == self.answers[rows, None], is_right, found == self._itself[rows, None]]
        # In the order of _REASONS.
        return np.select(checks, [1, 2, 3], 0).astype(np.int8)


def _choose(reasons: np.ndarray, answers: np.ndarray, options: MiningOptions) -> None:
    """Take the first candidates that are left in each row of ``reasons``; what was not looked at becomes -1."""
    names = ["skipped_top"] * options.skip_top + ["chosen"] * options.num_negatives
    for name in names:
        rows = np.flatnonzero((reasons == 0).any(axis=1))
        columns = (reasons[rows] == 0).argmax(axis=1)
        reasons[rows, columns] = _REASONS.index(name)
        again = (answers[rows] == answers[rows, columns][:, None]) & (reasons[rows] == 0)
        reasons[rows] = np.where(again, _REASONS.index("same_answer"), reasons[rows])
    chosen = reasons == _REASONS.index("chosen")
    last = np.where(chosen.sum(axis=1) == options.num_negatives, chosen.cumsum(axis=1).argmax(axis=1), chosen.shape[1])
    reasons[np.arange(chosen.shape[1]) > last[:, None]] = -1
