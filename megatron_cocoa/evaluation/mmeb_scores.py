"""Precision at 1 over candidate lists of unequal length, with ties told, and baselines that need no model.

MMEB's published code takes ``argmax`` of the cosines, where the first of equal ones wins, and the right candidate is
always first: an embedder that gives every input the same vector scores 100. So every score says beside it what it is
when ties are lost, what it is expected to be when they are drawn at random, and how many queries tie.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_cocoa.evaluation.metrics import TIE_TOLERANCE

BLOCK_ROWS = 64
"""Queries whose cosines with all items are in memory together."""

MOST_WASTE = 4
"""Products with all items at most, for one with an item that is a candidate, before rows are picked instead."""


@dataclass(frozen=True)
class TaskScore:
    """One task's result; counts of queries.

    num_pred:      queries.
    num_correct:   whose first best candidate is the right one: MMEB's definition.
    num_strict:    whose best candidate is the right one and ties with no other.
    expected:      sum over queries of the probability that a best candidate drawn at random is right.
    num_ties:      whose best candidate ties with another thing, right or wrong.
    predictions:   int64 ``(queries,)``, position of the first best candidate in its list.
    ranks:         int64 ``(queries,)``, from 1: other things that score higher than the right one, plus 1.
    """

    num_pred: int
    num_correct: int
    num_strict: int
    expected: float
    num_ties: int
    predictions: np.ndarray
    ranks: np.ndarray

    @property
    def acc(self) -> float:
        """Share of queries answered, in [0, 1]."""
        return self.num_correct / self.num_pred

    @property
    def all_tied(self) -> bool:
        """Whether no query tells its best candidates apart: the score then says nothing of the model."""
        return self.num_ties == self.num_pred


def score_task(queries: np.ndarray, items: np.ndarray, candidates: Sequence[np.ndarray]) -> TaskScore:
    """Rank each query's own candidates by cosine similarity; those within ``TIE_TOLERANCE`` of the best tie with it.

    Args:
        queries: float ``(queries, hidden)``, any scale.
        items: float ``(items, hidden)``.
        candidates: for each query int64 ``(candidates,)``, rows of ``items``, the right one first. A row that occurs
            again in a list is the same thing and no tie.

    Raises:
        ValueError: if there are not as many lists as queries, or a vector is zero or not finite.
    """
    if len(queries) != len(candidates) or not len(queries):
        raise ValueError(f"found {len(queries)} queries and {len(candidates)} candidate lists: need one each, not 0")
    unit_queries, unit_items = unit_rows(queries, "queries"), unit_rows(items, "things to embed")
    predictions = np.empty(len(queries), dtype=np.int64)
    ranks = np.empty(len(queries), dtype=np.int64)
    strict = ties = 0
    chances = []
    for row, (cosines, offered) in enumerate(zip(_cosines(unit_queries, unit_items, candidates), candidates)):
        right = offered == offered[0]
        best = cosines >= cosines.max() - TIE_TOLERANCE
        predictions[row] = int(np.argmax(best))
        better = cosines > cosines[0] + TIE_TOLERANCE
        ranks[row] = 1 + len(np.unique(offered[better & ~right]))
        num_things = len(np.unique(offered[best]))
        ties += num_things > 1
        strict += bool(right[best].all())
        chances.append(float(right[best].sum()) / float(best.sum()))
    correct = sum(int(offered[0] == offered[p]) for offered, p in zip(candidates, predictions.tolist()))
    return TaskScore(len(queries), correct, strict, math.fsum(chances), ties, predictions, ranks)


def _cosines(queries: np.ndarray, items: np.ndarray, candidates: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Of each query with its own candidates; where most lists hold most items, from products of whole blocks.

    Picking the rows of a list copies them, which takes several times as long as the product with them.
    """
    if len(queries) * len(items) > MOST_WASTE * sum(map(len, candidates)):
        yield from (items[offered] @ query for query, offered in zip(queries, candidates))
        return
    for start in range(0, len(queries), BLOCK_ROWS):
        block = queries[start : start + BLOCK_ROWS] @ items.T
        yield from (row[offered] for row, offered in zip(block, candidates[start : start + BLOCK_ROWS]))


def unit_rows(vectors: np.ndarray, name: str) -> np.ndarray:
    """float64 rows of length one.

    Raises:
        ValueError: naming the first row that is zero or not finite.
    """
    wide = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
    if bad.size:
        raise ValueError(
            f"{bad.size} of {len(wide)} {name} have an embedding that is zero or not finite (first: row {bad[0]}): "
            f"no cosine can be taken; under bf16 try fp32, else the weights are broken"
        )
    return wide / norms


def chance_accuracy(candidates: Sequence[np.ndarray]) -> float:
    """Expected accuracy of a candidate drawn at random from each list."""
    return math.fsum(float((offered == offered[0]).mean()) for offered in candidates) / len(candidates)


def majority_accuracy(candidates: Sequence[np.ndarray]) -> float:
    """Accuracy of the best constant answer: the share of queries whose right candidate is the most frequent one."""
    golds = Counter(int(offered[0]) for offered in candidates)
    return max(golds.values()) / len(candidates)
