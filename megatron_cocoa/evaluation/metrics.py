"""Retrieval recall that cannot be fooled by ties, and how far to trust it.

A broken embedder that gives every input the same vector scores 100% under a rank that counts only *better*
candidates, and 1/n under one that follows the order of the list. Here the headline is the *expected* recall when
ties are broken at random, which gives such an embedder exactly chance; the list-order (``argmax``, first wins)
and the pessimistic value (ties all lost) stand beside it, with the number of queries that a tie touches.

Several candidates may be right for one query (pictures that share a caption): rightness is equality of keys, and
a query is answered at k if any right candidate is among the first k.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TIE_TOLERANCE = 1e-6
"""Cosines closer than this are ties: float32 dot products of equal vectors differ by a few 1e-7 with the order of
summation, and a collapsed embedder must not be ranked by its rounding errors."""

DEFAULT_KS = (1, 5, 10)


@dataclass(frozen=True)
class Estimate:
    """A proportion in [0, 1] with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class RetrievalRanks:
    """Where the best right candidate of each query stands; CPU int64 tensors of shape ``(queries,)``.

    better:      wrong candidates that score higher than the best right one.
    tied_wrong:  wrong candidates that tie with it.
    tied_right:  right candidates that tie with it, itself included (1 or more).
    tied_before: wrong candidates that tie with it and stand before the first of them in the list.
    num_right:   right candidates in the whole list.
    """

    better: Tensor
    tied_wrong: Tensor
    tied_right: Tensor
    tied_before: Tensor
    num_right: Tensor
    num_candidates: int

    @property
    def argmax(self) -> Tensor:
        """Rank (from 1) when the first of equal candidates wins."""
        return self.better + self.tied_before + 1

    @property
    def pessimistic(self) -> Tensor:
        """Rank (from 1) when every tie is lost."""
        return self.better + self.tied_wrong + 1

    @property
    def expected(self) -> Tensor:
        """Mean rank (float64, from 1) over random orders of ties: ``better + (tied + 1) / (tied_right + 1)``."""
        tied = (self.tied_wrong + self.tied_right).double()
        return self.better + (tied + 1) / (self.tied_right + 1)

    def expected_recall(self, k: int) -> Tensor:
        """Probability, float64 ``(queries,)``, that a right candidate is among the first k, ties in random order."""
        tied = self.tied_wrong + self.tied_right
        drawn = (k - self.better).clamp(min=0).minimum(tied)
        missed = [_miss_probability(*row) for row in zip(tied.tolist(), self.tied_right.tolist(), drawn.tolist())]
        return 1 - torch.tensor(missed, dtype=torch.float64)


@dataclass(frozen=True)
class RetrievalResult:
    """Recall of one direction over one pool; every proportion in [0, 1], every dictionary keyed by k.

    recall:             expected over random orders of ties, with Wilson's 95% interval: the headline.
    recall_argmax:      where the first of equal candidates wins.
    recall_pessimistic: where every tie is lost.
    chance:             expected recall of a random order of the candidates.
    median_rank:        median over queries of the expected rank.
    num_tied_queries:   queries whose best right candidate ties with a wrong one.
    """

    num_queries: int
    num_candidates: int
    recall: dict[int, Estimate]
    recall_argmax: dict[int, float]
    recall_pessimistic: dict[int, float]
    chance: dict[int, float]
    median_rank: float
    num_tied_queries: int


def evaluate_retrieval(
    queries: Tensor,
    candidates: Tensor,
    *,
    query_keys: Sequence[Hashable],
    candidate_keys: Sequence[Hashable],
    ks: Sequence[int] = DEFAULT_KS,
    block_rows: int = 512,
) -> RetrievalResult:
    """Recall at each of ``ks`` when candidates are ordered by cosine similarity.

    Args:
        queries: float ``(queries, hidden)``, any scale.
        candidates: float ``(candidates, hidden)``.
        query_keys, candidate_keys: a candidate is right for a query where the keys are equal. Twins (equal
            captions) share a key and so are all right.
        ks: depths.
        block_rows: queries compared at a time, which bounds memory to ``block_rows x candidates`` scores.

    Raises:
        ValueError: as in ``retrieval_ranks``.
    """
    ranks = retrieval_ranks(
        queries, candidates, query_keys=query_keys, candidate_keys=candidate_keys, block_rows=block_rows
    )
    num_queries = len(query_keys)
    recall = {k: wilson_interval(float(ranks.expected_recall(k).sum()), num_queries) for k in ks}
    return RetrievalResult(
        num_queries=num_queries,
        num_candidates=ranks.num_candidates,
        recall=recall,
        recall_argmax={k: float((ranks.argmax <= k).double().mean()) for k in ks},
        recall_pessimistic={k: float((ranks.pessimistic <= k).double().mean()) for k in ks},
        chance={k: chance_recall(ranks.num_right.tolist(), ranks.num_candidates, k) for k in ks},
        median_rank=float(ranks.expected.quantile(0.5)),
        num_tied_queries=int((ranks.tied_wrong > 0).sum()),
    )


def evaluate_pairs(
    texts: Tensor,
    images: Tensor,
    *,
    keys: Sequence[Hashable],
    ks: Sequence[int] = DEFAULT_KS,
    block_rows: int = 512,
) -> dict[str, RetrievalResult]:
    """Both directions over one pool of pairs: ``{"text_to_image": ..., "image_to_text": ...}``.

    Args:
        texts, images: float ``(pairs, hidden)``, row i with row i.
        keys: one per pair, usually its caption: pairs with equal keys are right for each other.
        ks, block_rows: as in ``evaluate_retrieval``.
    """
    shared = {"query_keys": keys, "candidate_keys": keys, "ks": ks, "block_rows": block_rows}
    return {
        "text_to_image": evaluate_retrieval(texts, images, **shared),
        "image_to_text": evaluate_retrieval(images, texts, **shared),
    }


def retrieval_ranks(
    queries: Tensor,
    candidates: Tensor,
    *,
    query_keys: Sequence[Hashable],
    candidate_keys: Sequence[Hashable],
    block_rows: int = 512,
) -> RetrievalRanks:
    """Where each query's best right candidate stands among all candidates, ties within ``TIE_TOLERANCE`` counted apart.

    Args:
        queries, candidates, query_keys, candidate_keys, block_rows: as in ``evaluate_retrieval``.

    Raises:
        ValueError: if a side is empty, keys do not fit the rows, an embedding is zero or not finite, or a query
            has no right candidate.
    """
    codes: dict[Hashable, int] = {}
    wanted, offered = (
        torch.tensor([codes.setdefault(key, len(codes)) for key in keys], dtype=torch.int64, device=queries.device)
        for keys in (query_keys, candidate_keys)
    )
    for name, rows, keys in (("queries", queries, wanted), ("candidates", candidates, offered)):
        if rows.dim() != 2 or rows.shape[0] != keys.shape[0]:
            raise ValueError(f"{name} have shape {tuple(rows.shape)}, with {keys.shape[0]} keys: need one key a row")
    columns = []
    for start, cosines in _cosine_blocks(queries, candidates, block_rows):
        right = wanted[start : start + cosines.shape[0], None] == offered[None, :]
        columns.append(_rank_block(cosines, right))
    better, tied_wrong, tied_right, tied_before, num_right = (torch.cat(parts).cpu() for parts in zip(*columns))
    orphans = torch.nonzero(num_right == 0).flatten().tolist()
    if orphans:
        first = query_keys[orphans[0]]
        raise ValueError(
            f"{len(orphans)} of {len(query_keys)} queries have no right candidate (first: row {orphans[0]}, key "
            f"{first!r}): the pool must hold at least one candidate with each query's key"
        )
    return RetrievalRanks(better, tied_wrong, tied_right, tied_before, num_right, candidates.shape[0])


def top_candidates(
    queries: Tensor, candidates: Tensor, *, k: int, block_rows: int = 512
) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest candidates of each query, the earlier of equal ones first.

    Returns:
        ``(indices, cosines)``: CPU int64 and float32 ``(queries, min(k, candidates))``, best first.

    Raises:
        ValueError: if a side is empty, or an embedding is zero or not finite.
    """
    indices, cosines = [], []
    for _, block in _cosine_blocks(queries, candidates, block_rows):
        values, order = block.sort(dim=1, descending=True, stable=True)
        indices.append(order[:, :k].cpu())
        cosines.append(values[:, :k].cpu())
    return torch.cat(indices), torch.cat(cosines)


def chance_recall(num_right: Sequence[int], num_candidates: int, k: int) -> float:
    """Mean probability that a random order has one of each query's ``num_right`` candidates among the first k."""
    missed = {right: _miss_probability(num_candidates, right, min(k, num_candidates)) for right in set(num_right)}
    return 1 - math.fsum(missed[right] for right in num_right) / len(num_right)


def wilson_interval(successes: float, trials: int, *, z: float = 1.959963984540054) -> Estimate:
    """Wilson's score interval of a proportion; ``z`` is the normal quantile (default: 95%).

    Holds its coverage near 0 and 1, where the usual ``p +- z * se`` collapses. ``successes`` may be fractional
    (expected hits under ties). Queries count as independent: variants of one concept make it too narrow.
    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (JASA 22, 1927).

    Raises:
        ValueError: if there is no trial, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials * (1 + 1e-9):
        raise ValueError(f"need 0 <= successes <= trials and at least one trial, found {successes} of {trials}")
    p = min(successes / trials, 1.0)
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # At p = 0 and 1 an end equals p exactly in theory; rounding must not put it on the wrong side.
    return Estimate(p, min(p, max(0.0, (centre - spread) / scale)), max(p, min(1.0, (centre + spread) / scale)))


def _miss_probability(block: int, right: int, drawn: int) -> float:
    """Probability that ``drawn`` items of a shuffled ``block`` hold none of the ``right`` ones (hypergeometric)."""
    if drawn > block - right:
        return 0.0
    return math.prod((block - right - i) / (block - i) for i in range(drawn))


def _rank_block(cosines: Tensor, right: Tensor) -> tuple[Tensor, ...]:
    """The five columns of ``RetrievalRanks`` for one block of queries."""
    best = cosines.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
    tied = (cosines - best).abs() <= TIE_TOLERANCE
    better = (cosines > best + TIE_TOLERANCE) & ~right
    tied_right, tied_wrong = tied & right, tied & ~right
    # Columns before the first tied right one: those whose running count of tied right ones is still zero.
    before = tied_right.cumsum(dim=1) == 0
    columns = better, tied_wrong, tied_right, tied_wrong & before, right
    return tuple(column.sum(dim=1) for column in columns)


def _cosine_blocks(queries: Tensor, candidates: Tensor, block_rows: int) -> Iterator[tuple[int, Tensor]]:
    """Yield ``(first row, float32 cosines (rows, candidates))`` over consecutive blocks of queries."""
    if block_rows < 1:
        raise ValueError(f"block_rows is {block_rows}, needs 1 or more")
    unit_candidates = _unit_rows("candidates", candidates)
    unit_queries = _unit_rows("queries", queries)
    for start in range(0, unit_queries.shape[0], block_rows):
        yield start, unit_queries[start : start + block_rows] @ unit_candidates.T


def _unit_rows(name: str, embeddings: Tensor) -> Tensor:
    if embeddings.dim() != 2 or embeddings.shape[0] == 0:
        raise ValueError(f"{name} have shape {tuple(embeddings.shape)}, need (rows, hidden) with at least one row")
    wide = embeddings.detach().float()
    norms = wide.norm(dim=1, keepdim=True)
    bad = int((~(torch.isfinite(norms) & (norms > 0))).sum())
    if bad:
        raise ValueError(f"{bad} of {embeddings.shape[0]} {name} are zero or not finite: their cosine has no meaning")
    return wide / norms
