"""Stage 1, bidirectional warm-up by joint reconstruction: MNTP + ``mae_weight`` x MAE.

Each term is normalised by its own global count before the weighted sum, so that the balance between text and
pixels does not depend on the length of captions or the size of pictures. Source: CoCoA (arXiv 2603.01471),
stage 1; the weight 0.5 is that of the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_cocoa.batch import MaskKind, ModelOutput, PackedBatch
from megatron_cocoa.objectives.mae import MaeObjective
from megatron_cocoa.objectives.mntp import MntpObjective


class WarmupObjective:
    """Text and pixel reconstruction under bidirectional attention.

    Args:
        mae_weight: coefficient of the pixel loss.

    Raises:
        ValueError: if ``mae_weight`` is negative.
    """

    name = "warmup"
    mask_kind = MaskKind.BIDIRECTIONAL

    def __init__(self, *, mae_weight: float = 0.5) -> None:
        if mae_weight < 0:
            raise ValueError(f"mae_weight is {mae_weight}, must not be negative")
        self._terms = (MntpObjective(self.mask_kind), MaeObjective(self.mask_kind))
        self.weights: Mapping[str, float] = {MntpObjective.term: 1.0, MaeObjective.term: mae_weight}

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        """``{"mntp": masked text tokens, "mae": masked units, or patches}``, see ``LocalObjective.counts``."""
        return {term: count for part in self._terms for term, count in part.counts(batch).items()}

    def loss(
        self, output: ModelOutput, batch: PackedBatch, totals: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of both terms, see ``LocalObjective.loss``. Metrics stay unweighted.

        A term that this micro-batch or the whole step has no unit of contributes an exact zero.

        Raises:
            ValueError: as in ``MntpObjective.loss`` and ``MaeObjective.loss``.
        """
        shares, metrics = [], {}
        for part in self._terms:
            share, sums = part.loss(output, batch, totals)
            shares.append(self.weights[part.term] * share)
            metrics.update(sums)
        return shares[0] + shares[1], metrics
