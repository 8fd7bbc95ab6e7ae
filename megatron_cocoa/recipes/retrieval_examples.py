"""Queries to look at: some that find a right answer first, some that do not, and those that rank it lowest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_cocoa.data.rows import CaptionRow
from megatron_cocoa.evaluation.metrics import retrieval_ranks, top_candidates
from megatron_cocoa.evaluation.report_data import RetrievalStrip, StripCandidate, StripKind

NUM_EXAMPLES = 3
"""Of each kind and direction."""

DEPTH = 5


def pool_examples(
    rows: Sequence[CaptionRow], texts: Tensor, pictures: Tensor, *, thumbnail: Callable[[CaptionRow], bytes]
) -> list[RetrievalStrip]:
    """Strips of the held-out pool in both directions, hits, misses and worst queries of each.

    Args:
        rows: of the pool; equal captions are right for each other.
        texts, pictures: float32 ``(rows, hidden)`` each.
        thumbnail: a row's picture as a PNG file.
    """
    keys = [row.caption for row in rows]
    strips = []
    for direction, queries, candidates in (("text_to_image", texts, pictures), ("image_to_text", pictures, texts)):
        by_text = direction == "text_to_image"
        ranks = retrieval_ranks(queries, candidates, query_keys=keys, candidate_keys=keys).expected
        for kind, chosen in _chosen(ranks).items():
            if not chosen:
                continue
            nearest, cosines = top_candidates(queries[chosen], candidates, k=DEPTH)
            for item, places, values in zip(chosen, nearest.tolist(), cosines.tolist()):
                answers = [
                    StripCandidate(
                        cosine,
                        keys[place] == keys[item],
                        text="" if by_text else rows[place].caption,
                        png=thumbnail(rows[place]) if by_text else None,
                    )
                    for place, cosine in zip(places, values)
                ]
                strips.append(
                    RetrievalStrip(
                        pool="heldout",
                        direction=direction,
                        candidates=tuple(answers),
                        rank=float(ranks[item]),
                        num_candidates=len(rows),
                        query_text=rows[item].caption if by_text else "",
                        query_png=None if by_text else thumbnail(rows[item]),
                        kind=kind,
                    )
                )
    return strips


def _chosen(ranks: Tensor) -> dict[StripKind, list[int]]:
    """A few queries of each kind, hits and misses evenly over the pool, none of them twice."""
    # A tie that a random order wins half of the time is no hit.
    missed = ranks > 1
    worst = torch.argsort(-ranks, stable=True)[:NUM_EXAMPLES].tolist()
    worst = [item for item in worst if missed[item]]
    misses = [item for item in torch.nonzero(missed).flatten().tolist() if item not in worst]
    return {"hit": _spread(torch.nonzero(~missed).flatten().tolist()), "miss": _spread(misses), "worst": worst}


def _spread(items: list[int]) -> list[int]:
    if len(items) <= NUM_EXAMPLES:
        return items
    return [items[int(place)] for place in torch.linspace(0, len(items) - 1, NUM_EXAMPLES + 2)[1:-1]]
