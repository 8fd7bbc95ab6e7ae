"""Stage 3, contrastive learning: each query picks its own target among the whole step's targets (InfoNCE).

The loss is global: every pair is a negative of every other pair, across ranks and micro-batches. It therefore takes
embeddings that the trainer has gathered, and is differentiable in them (gradient caching, Gao et al., arXiv
2101.06983). Similarities are computed for one block of rows at a time, and once more in the backward pass, so that
memory grows with the batch and not with its square.

Sources: InfoNCE, van den Oord et al., arXiv 1807.03748; the symmetric form and the learned temperature, Radford et
al., CLIP, arXiv 2103.00020; nested dimensions, Kusupati et al., arXiv 2205.13147; defaults from CoCoA (arXiv
2603.01471), stage 3. Shape legend: P pairs of the step, R rows of a block, K hard negatives a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_cocoa.batch import MaskKind
from megatron_cocoa.objectives.base import PairEmbeddings
from megatron_cocoa.objectives.embedding_metrics import effective_rank, similarity_metrics, similarity_sums

ROWS_PER_BLOCK = 256
"""Queries whose similarities are in memory together."""


class ContrastiveObjective:
    """InfoNCE over cosine similarities, query to target.

    Args:
        temperature: divides the cosines, unless the embeddings bring a learned scale.
        symmetric: average with the target-to-query direction, as in CLIP; it has no hard negatives.
        mask_equal_targets: leave other pairs' targets, and hard negatives, out of a row's negatives if they equal the
            row's own target.
        hard_negatives_shared: a query's negatives include the hard negatives of all pairs; False: only its own pair's.
        matryoshka_dims: widths d whose losses are averaged; each is the loss on the first d dimensions, renormalised.
            Empty: the whole width alone.
        matryoshka_weights: weights of the widths in that average; empty weighs them equally.
        mask_kind: attention that the embeddings are computed under.

    Raises:
        ValueError: if ``temperature`` is not positive.
    """

    name = "contrastive"

    def __init__(
        self,
        *,
        temperature: float = 0.02,
        symmetric: bool = False,
        mask_equal_targets: bool = False,
        hard_negatives_shared: bool = True,
        matryoshka_dims: Sequence[int] = (),
        matryoshka_weights: Sequence[float] = (),
        mask_kind: MaskKind = MaskKind.BIDIRECTIONAL,
    ) -> None:
        self.mask_kind = mask_kind
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, must be positive")
        self.temperature = temperature
        self.symmetric = symmetric
        self.mask_equal_targets = mask_equal_targets
        self.hard_negatives_shared = hard_negatives_shared
        self.matryoshka_dims = tuple(matryoshka_dims)
        self.matryoshka_weights = tuple(matryoshka_weights) or (1.0,) * len(self.matryoshka_dims)

    def embedding_loss(self, pairs: PairEmbeddings, *, detailed: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean InfoNCE loss in nats over the step's pairs.

        Args:
            pairs: of the whole step; keys are needed with ``mask_equal_targets``. Computed in float32 (float64 stays
                float64).
            detailed: also compute the ``effective_rank``, which costs an eigendecomposition.

        Returns:
            ``(loss, metrics)``. Metrics are detached scalars of the whole step, not sums: ``contrastive`` (the
            loss), ``accuracy`` (share of rows whose own target scores highest of all candidates; the earlier column
            wins a tie), ``positive_cosine``, ``negative_cosine`` (mean over the in-batch negatives that count; 0 if
            there is none). With nested widths also ``contrastive_<width>`` for each; the other metrics are then
            those of the largest. With a learned scale ``temperature``, and with ``detailed`` ``effective_rank`` (of
            queries and targets together).

        Raises:
            ValueError: if the shapes disagree, there are fewer than two pairs, keys are needed and missing, or a
                nested width is larger than the embeddings.
        """
        self._check(pairs)
        pairs = replace(pairs, **{name: _widen(getattr(pairs, name)) for name in ("queries", "targets", "negatives")})
        width = pairs.queries.shape[1]
        dims, weights = self.matryoshka_dims or (width,), self.matryoshka_weights or (1.0,)
        losses, metrics = {}, {}
        for dim in dims:
            losses[dim], found = self._loss_at(dim, pairs)
            metrics = found if dim == max(dims) else metrics
        loss = sum(weight * losses[dim] for dim, weight in zip(dims, weights)) / sum(weights)
        metrics |= {f"contrastive_{dim}": value.detach() for dim, value in losses.items() if self.matryoshka_dims}
        if pairs.logit_scale is not None:
            metrics["temperature"] = (-pairs.logit_scale.detach()).exp()
        if detailed:
            metrics["effective_rank"] = effective_rank(_unit(torch.cat([pairs.queries, pairs.targets]), max(dims)))
        return loss, {"contrastive": loss.detach(), **metrics}

    def _loss_at(self, dim: int, pairs: PairEmbeddings) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics on the first ``dim`` dimensions."""
        queries, targets = _unit(pairs.queries, dim), _unit(pairs.targets, dim)
        negatives = None if pairs.negatives is None else _unit(pairs.negatives, dim)
        temperature = self.temperature if pairs.logit_scale is None else (-pairs.logit_scale).exp()

        def query_to_target(rows: Tensor) -> tuple[Tensor, Tensor]:
            cosines, excluded = queries[rows] @ targets.T, self._equal_targets(pairs, rows)
            logits = (cosines / temperature).masked_fill(excluded, float("-inf"))
            if negatives is not None:
                hard, missing = self._hard_negatives(pairs, rows, queries, negatives)
                logits = torch.cat([logits, (hard / temperature).masked_fill(missing, float("-inf"))], dim=1)
            return _nll(logits, rows), similarity_sums(cosines.detach(), logits.detach(), excluded, rows)

        def target_to_query(rows: Tensor) -> tuple[Tensor, Tensor]:
            # Equality of targets is mutual: the pairs that a query leaves out are left out for its target, too.
            logits = (targets[rows] @ queries.T / temperature).masked_fill(
                self._equal_targets(pairs, rows), float("-inf")
            )
            return _nll(logits, rows), logits.new_zeros(())

        count = len(queries)
        loss, sums = _over_blocks(query_to_target, count, queries.device)
        loss = loss / count
        if self.symmetric:
            loss = (loss + _over_blocks(target_to_query, count, queries.device)[0] / count) / 2
        return loss, similarity_metrics(sums, count)

    def _equal_targets(self, pairs: PairEmbeddings, rows: Tensor) -> Tensor:
        """Bool ``(R, P)``: other pairs' targets that count neither as positive nor as negative."""
        if not self.mask_equal_targets:
            return torch.zeros(len(rows), len(pairs.queries), dtype=torch.bool, device=rows.device)
        equal = pairs.target_keys[rows, None] == pairs.target_keys[None, :]
        equal[torch.arange(len(rows), device=rows.device), rows] = False
        return equal

    def _hard_negatives(
        self, pairs: PairEmbeddings, rows: Tensor, queries: Tensor, negatives: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cosines to hard negatives, ``(R, P * K)`` shared or ``(R, K)`` of each pair's own, and a mask,
        broadcastable to them, of those to be left out.

        The empty places of a pair with fewer than K hard negatives are left out.
        """
        if self.hard_negatives_shared:
            cosines = queries[rows] @ negatives.flatten(0, 1).T
            missing = ~pairs.negative_mask.reshape(1, -1)
            keys = None if pairs.negative_keys is None else pairs.negative_keys.reshape(1, -1)
        else:
            cosines = (queries[rows, None] * negatives[rows]).sum(-1)
            missing = ~pairs.negative_mask[rows]
            keys = None if pairs.negative_keys is None else pairs.negative_keys[rows]
        if self.mask_equal_targets:
            missing = missing | (keys == pairs.target_keys[rows, None])
        return cosines, missing

    def _check(self, pairs: PairEmbeddings) -> None:
        queries, targets = pairs.queries, pairs.targets
        if queries.dim() != 2 or queries.shape != targets.shape:
            raise ValueError(
                f"queries have shape {tuple(queries.shape)}, targets {tuple(targets.shape)}: both must be "
                f"(pairs, hidden) with the same numbers"
            )
        count, width = queries.shape
        if count < 2:
            raise ValueError(
                f"{count} pair(s) in the step: a contrastive loss needs at least two, as each pair's negatives are "
                f"the others; raise contrastive.global_batch_size"
            )
        check_matryoshka_dims(self.matryoshka_dims, width)
        hard = None if pairs.negatives is None else tuple(pairs.negatives.shape[:2])
        self._check_rows("negative_mask", pairs.negative_mask, hard, needed=hard is not None)
        self._check_rows("target_keys", pairs.target_keys, (count,), needed=self.mask_equal_targets)
        self._check_rows(
            "negative_keys", pairs.negative_keys, hard, needed=self.mask_equal_targets and hard is not None
        )

    def _check_rows(self, name: str, found: Tensor | None, shape: tuple[int, ...] | None, *, needed: bool) -> None:
        if needed and (found is None or tuple(found.shape) != shape):
            option = "mask_equal_targets needs" if name.endswith("keys") else "hard negatives need"
            raise ValueError(f"{option} {name} of shape {shape}, found {None if found is None else tuple(found.shape)}")


def check_matryoshka_dims(dims: Sequence[int], hidden_size: int) -> None:
    """Refuse nested widths above that of the model's embeddings.

    Raises:
        ValueError: with the numbers.
    """
    if max(dims, default=0) > hidden_size:
        raise ValueError(
            f"contrastive.matryoshka_dims are {list(dims)}, the model's embeddings have {hidden_size} dimensions: name "
            f"none above that"
        )


def _over_blocks(
    block: Callable[[Tensor], tuple[Tensor, Tensor]], count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Sums over blocks of rows of what ``block`` returns; the backward pass computes each block again."""
    runs = torch.arange(count, device=device).split(ROWS_PER_BLOCK)
    if len(runs) == 1:
        return block(runs[0])
    results = [checkpoint(block, rows, use_reentrant=False, preserve_rng_state=False) for rows in runs]
    return sum(loss for loss, _ in results), sum(sums for _, sums in results)


def _nll(logits: Tensor, own: Tensor) -> Tensor:
    """Summed cross-entropy of each row's own column."""
    return (logits.logsumexp(dim=1) - logits.gather(1, own[:, None]).squeeze(1)).sum()


def _widen(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.promote_types(x.dtype, torch.float32))


def _unit(x: Tensor, dim: int) -> Tensor:
    """The first ``dim`` dimensions at length 1; a vector of zeros stays one."""
    return F.normalize(x[..., :dim], dim=-1)
