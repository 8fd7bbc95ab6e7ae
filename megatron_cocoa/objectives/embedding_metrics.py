"""Metrics of a step's embeddings: how well pairs are separated, and whether the embeddings collapse."""

from __future__ import annotations

import torch
from torch import Tensor


def similarity_sums(cosines: Tensor, logits: Tensor, excluded: Tensor, own: Tensor) -> Tensor:
    """Sums over a block of queries, from which ``similarity_metrics`` makes means.

    Args:
        cosines, excluded: ``(queries, targets)``: to the step's targets, and which of them do not count.
        logits: ``(queries, candidates)``: targets first, then hard negatives; minus infinity where excluded.
        own: int64 ``(queries,)``: each query's own column.

    Returns:
        ``(4,)``: the number of queries whose own target scores highest (the earlier column wins a tie), the sum of
        cosines to own targets, the sum of cosines to other targets, and the number of these.
    """
    rows = torch.arange(len(own), device=own.device)
    others = ~excluded
    others[rows, own] = False
    right = (logits.argmax(dim=1) == own).to(cosines.dtype).sum()
    return torch.stack([right, cosines[rows, own].sum(), (cosines * others).sum(), others.sum().to(cosines.dtype)])


def similarity_metrics(sums: Tensor, pairs: int) -> dict[str, Tensor]:
    """Means from the ``sums`` over all blocks of a step with so many ``pairs``: ``accuracy``, ``positive_cosine``, and
    ``negative_cosine`` over the in-batch negatives that count (0 if there is none).
    """
    right, own, others, count = sums
    return {
        "accuracy": right / pairs,
        "positive_cosine": own / pairs,
        "negative_cosine": others / count.clamp_min(1),
    }


def effective_rank(embeddings: Tensor) -> Tensor:
    """How many directions the embeddings use: exp of the entropy of their singular values, scaled to sum to 1.

    Between 1 (all on one line: collapse) and ``min(rows, hidden)``. Not centred, so a shared offset lowers it.
    Source: Roy and Vetterli, "The effective rank" (EUSIPCO 2007). Taken from the smaller Gram matrix in float64,
    which costs less than a decomposition of the rows and keeps small singular values apart from rounding.

    Args:
        embeddings: float ``(rows, hidden)``.

    Returns:
        Float32 scalar; NaN where an embedding is not finite or all are zero.
    """
    wide = embeddings.detach().double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    if not bool(torch.isfinite(gram).all()):
        # The eigenvalue solver raises on NaN; a bad step must reach the trainer's own check of the loss instead.
        return torch.full((), float("nan"), device=embeddings.device)
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = singular / singular.sum()
    return torch.special.entr(shares).sum().exp().float()
