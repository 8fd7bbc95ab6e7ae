"""Stage 3, contrastive learning: each query picks its own target among the whole step's targets (InfoNCE).

The loss is global: every pair is every other pair's negative, across ranks and micro-batches. It therefore takes
embeddings that the trainer has gathered, and hands gradients back for the trainer to distribute (gradient
caching, Gao et al., arXiv 2101.06983). Sources: InfoNCE, van den Oord et al., arXiv 1807.03748; the symmetric
form, Radford et al., CLIP, arXiv 2103.00020; defaults from CoCoA (arXiv 2603.01471), stage 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_cocoa.batch import MaskKind


class ContrastiveObjective:
    """InfoNCE over cosine similarities, query to target.

    Args:
        temperature: divides the cosines.
        symmetric: average with the target-to-query direction, as in CLIP.
        mask_equal_targets: leave out of a row's negatives each other pair whose target equals the row's own.

    Raises:
        ValueError: if ``temperature`` is not positive.
    """

    name = "contrastive"
    mask_kind = MaskKind.BIDIRECTIONAL

    def __init__(
        self, *, temperature: float = 0.02, symmetric: bool = False, mask_equal_targets: bool = False
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, must be positive")
        self.temperature = temperature
        self.symmetric = symmetric
        self.mask_equal_targets = mask_equal_targets

    def embedding_loss(
        self, queries: Tensor, targets: Tensor, target_keys: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean InfoNCE loss in nats over the step's pairs.

        Args:
            queries, targets: float ``(pairs, hidden)``, not normalised, over all ranks and micro-batches; row i
                belongs to row i. Computed in float32 (float64 stays float64).
            target_keys: int64 ``(pairs,)``, equal where targets are equal; needed with ``mask_equal_targets``.

        Returns:
            ``(loss, metrics)``. Metrics are detached scalars of the whole step, not sums: ``contrastive`` (the
            loss), ``accuracy`` (rows whose own target scores highest; an earlier column wins a tie),
            ``positive_cosine``, ``negative_cosine`` (over the negatives that count; 0 if none is left) and
            ``effective_rank`` (of queries and targets together).

        Raises:
            ValueError: if the shapes disagree, there are fewer than two pairs, or keys are needed and missing.
        """
        excluded = self._excluded(queries, targets, target_keys)
        unit_queries, unit_targets = _normalize(queries), _normalize(targets)
        cosines = unit_queries @ unit_targets.T
        logits = (cosines / self.temperature).masked_fill(excluded, float("-inf"))
        own = logits.diagonal()
        loss = (logits.logsumexp(dim=1) - own).mean()
        if self.symmetric:
            loss = (loss + (logits.logsumexp(dim=0) - own).mean()) / 2
        with torch.no_grad():
            metrics = {"contrastive": loss.detach(), **_similarity_metrics(cosines, logits, excluded)}
            metrics["effective_rank"] = effective_rank(torch.cat([unit_queries, unit_targets]))
        return loss, metrics

    def embedding_gradients(
        self, queries: Tensor, targets: Tensor, target_keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """The loss and its gradients with respect to embeddings that are already cut from their graph.

        Args:
            queries, targets, target_keys: as in ``embedding_loss``.

        Returns:
            ``(loss, query_gradients, target_gradients, metrics)``, detached; gradients are ``(pairs, hidden)``
            in the loss's precision (float32), so that the caller's cast to the model's dtype is the only one.

        Raises:
            ValueError: as in ``embedding_loss``.
        """
        with torch.enable_grad():
            leaves = [_widen(x.detach()).requires_grad_() for x in (queries, targets)]
            loss, metrics = self.embedding_loss(*leaves, target_keys)
            query_gradients, target_gradients = torch.autograd.grad(loss, leaves)
        return loss.detach(), query_gradients, target_gradients, metrics

    def _excluded(self, queries: Tensor, targets: Tensor, target_keys: Tensor | None) -> Tensor:
        """Bool ``(pairs, pairs)``: entries that count neither as positive nor as negative."""
        if queries.dim() != 2 or queries.shape != targets.shape:
            raise ValueError(
                f"queries have shape {tuple(queries.shape)}, targets {tuple(targets.shape)}: both must be "
                f"(pairs, hidden) with the same numbers"
            )
        pairs = queries.shape[0]
        if pairs < 2:
            raise ValueError(
                f"{pairs} pair(s) in the step: a contrastive loss needs at least two, as each pair's negatives are "
                f"the others; raise contrastive.global_batch_size"
            )
        if not self.mask_equal_targets:
            return torch.zeros((pairs, pairs), dtype=torch.bool, device=queries.device)
        if target_keys is None or tuple(target_keys.shape) != (pairs,):
            found = None if target_keys is None else tuple(target_keys.shape)
            raise ValueError(f"mask_equal_targets needs target_keys of shape ({pairs},), found {found}")
        keys = target_keys.to(queries.device)
        return (keys[:, None] == keys[None, :]).fill_diagonal_(False)


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


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalize(x: Tensor) -> Tensor:
    return F.normalize(_widen(x), dim=-1)


def _similarity_metrics(cosines: Tensor, logits: Tensor, excluded: Tensor) -> dict[str, Tensor]:
    pairs = cosines.shape[0]
    negatives = (~excluded).fill_diagonal_(False)
    rows = torch.arange(pairs, device=cosines.device)
    return {
        "accuracy": (logits.argmax(dim=1) == rows).float().mean(),
        "positive_cosine": cosines.diagonal().mean(),
        "negative_cosine": (cosines * negatives).sum() / negatives.sum().clamp_min(1),
    }
