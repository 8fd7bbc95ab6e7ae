"""Hard negatives: for each training pair the nearest wrong targets, at a distance from what may well be right.

A target that is as near to the query as its own positive is more likely a second right answer than a hard wrong one
(NV-Retriever, arXiv 2407.15831). So a candidate must score below the positive by a margin, and what is equal to the
positive, to another positive of the same query, or to the query itself is no candidate at all. Search is exact.
"""

from __future__ import annotations

import importlib.util
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from megatron_cocoa.evaluation.metrics import TIE_TOLERANCE

TIE_DECIMALS = 6
BLOCK_QUERIES = 8192


class Content(NamedTuple):
    """One side of a pair, as in MMEB-train."""

    text: str
    image_path: str

    @property
    def words(self) -> str | None:
        """What makes two texts one answer; None where the picture is the answer."""
        return None if self.image_path else " ".join(self.text.casefold().split())


@dataclass(frozen=True)
class MiningOptions:
    """What counts as a hard negative.

    Args:
        num_negatives: per row, at most.
        margin: cosine by which a candidate must stay below the row's positive; what ties with that is within any.
        skip_top: nearest admissible candidates to pass over.
        depth: neighbours looked at per row.

    Raises:
        ValueError: if a number is out of range, or the depth cannot give as many.
    """

    num_negatives: int = 1
    margin: float = 0.05
    skip_top: int = 0
    depth: int = 200

    def __post_init__(self) -> None:
        if self.num_negatives < 1 or self.skip_top < 0 or not 0 <= self.margin <= 2:
            raise ValueError(
                f"num_negatives is {self.num_negatives} (1 or more), skip_top {self.skip_top} (0 or more), margin "
                f"{self.margin} (between 0 and 2)"
            )
        if self.depth < self.num_negatives + self.skip_top:
            needed = f"num_negatives {self.num_negatives} + skip_top {self.skip_top}"
            raise ValueError(f"depth {self.depth} is below {needed}: raise it")


@dataclass
class Mined:
    """Negatives of each row, nearest first, and why neighbours were passed over.

    counts: ``chosen``, ``own_positive``, ``other_positive``, ``is_the_query``, ``within_margin`` (suspected false
        negatives), ``skipped_top``; and rows: ``full_rows``, ``short_rows`` (fewer than asked), ``empty_rows``.
    """

    negatives: list[list[Content]]
    scores: list[list[float]]
    counts: Counter[str] = field(default_factory=Counter)


def mine(
    queries: Sequence[Content],
    positives: Sequence[Content],
    query_vectors: np.ndarray,
    positive_vectors: np.ndarray,
    options: MiningOptions,
) -> Mined:
    """Find hard negatives among the positives of other rows.

    Args:
        queries, positives: of each row.
        query_vectors, positive_vectors: float32 ``(rows, hidden)``, rows of length one.
        options: what to take.

    Raises:
        ValueError: if the numbers of rows or the lengths of vectors differ, or faiss is not installed.
    """
    shapes = {len(queries), len(positives), len(query_vectors), len(positive_vectors)}
    if len(shapes) != 1 or query_vectors.shape[1:] != positive_vectors.shape[1:]:
        raise ValueError(
            f"found {len(queries)} pairs, query vectors {query_vectors.shape} and target vectors "
            f"{positive_vectors.shape}: embed both sides of the very same file with one model"
        )
    distinct: dict[Content, int] = {}
    for row, content in enumerate(positives):
        distinct.setdefault(content, row)
    contents = list(distinct)
    pool = positive_vectors[list(distinct.values())]
    # A copy of the positive under another path scores the same but for rounding, and is as right.
    limits = np.einsum("rh,rh->r", query_vectors, positive_vectors) - max(options.margin, TIE_TOLERANCE)
    rights = defaultdict(set)
    for query, positive in zip(queries, positives):
        rights[query].add(_answer(positive))
    found = _search(pool, query_vectors, min(options.depth, len(contents)))
    mined = Mined([], [])
    for row, (query, (places, scores)) in enumerate(zip(queries, found)):
        chosen, skipped = [], 0
        for place, score in zip(places, scores):
            if len(chosen) == options.num_negatives:
                break
            candidate = contents[place]
            reason = _refused(candidate, query, positives[row], rights[query])
            if reason is None and score > limits[row]:
                reason = "within_margin"
            if reason is None and skipped < options.skip_top:
                skipped, reason = skipped + 1, "skipped_top"
            if reason is None:
                chosen.append((candidate, float(score)))
            mined.counts[reason or "chosen"] += 1
        rows = "full_rows" if len(chosen) == options.num_negatives else "short_rows" if chosen else "empty_rows"
        mined.counts[rows] += 1
        mined.negatives.append([content for content, _ in chosen])
        mined.scores.append([score for _, score in chosen])
    return mined


def _answer(content: Content) -> Any:
    return content if content.words is None else content.words


def _refused(candidate: Content, query: Content, positive: Content, rights: set) -> str | None:
    if _answer(candidate) == _answer(positive):
        return "own_positive"
    if _answer(candidate) in rights:
        return "other_positive"
    same_picture = bool(candidate.image_path) and candidate.image_path == query.image_path
    if same_picture or (candidate.words is not None and candidate.words == query.words):
        return "is_the_query"
    return None


def _search(pool: np.ndarray, queries: np.ndarray, depth: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Exact nearest neighbours by cosine, equal ones in the order of the pool.

    Yields:
        int64 and float32 ``(depth,)`` for each query, best first; a block of queries is searched at a time, for those
        of all would take some 40 bytes a neighbour.
    """
    if importlib.util.find_spec("faiss") is None:
        raise ValueError("mining needs the package faiss: pip install 'megatron_cocoa[mine]' (that is, faiss-cpu)")
    import faiss

    index = faiss.IndexFlatIP(pool.shape[1])
    index.add(np.ascontiguousarray(pool, dtype=np.float32))
    for start in range(0, len(queries), BLOCK_QUERIES):
        block = np.ascontiguousarray(queries[start : start + BLOCK_QUERIES], dtype=np.float32)
        scores, places = index.search(block, depth)
        # Rounded, so that the order of sums inside the library decides nothing.
        rounded = scores.astype(np.float64).round(TIE_DECIMALS)
        order = np.lexsort((places, -rounded), axis=1)
        yield from zip(np.take_along_axis(places, order, axis=1), np.take_along_axis(scores, order, axis=1))
