"""Masked next-token prediction: the hidden state at row i - 1 predicts the masked token at row i.

The shift is in ``PackedBatch.text_positions``, the cross-entropy in the model's vocabulary-parallel head
(full logits never leave it); this module sums and normalises. Source: BehnamGhader et al.,
LLM2Vec (arXiv 2404.05961, section 2.2), as used in CoCoA (arXiv 2603.01471), stages 1 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_cocoa.batch import MaskKind, ModelOutput, PackedBatch
from megatron_cocoa.objectives.base import graph_zero, require_mask_kind, require_rows, share_of_total


class MntpObjective:
    """Cross-entropy in nats, averaged over the masked text tokens of the whole step.

    Args:
        mask_kind: attention under which the tokens are predicted.
    """

    name = "mntp"
    term = "mntp"

    def __init__(self, mask_kind: MaskKind = MaskKind.BIDIRECTIONAL) -> None:
        self.mask_kind = mask_kind
        self.weights: Mapping[str, float] = {self.term: 1.0}

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        """``{"mntp": masked text tokens}`` of the whole micro-batch, see ``LocalObjective.counts``."""
        require_mask_kind(self, batch)
        return {self.term: 0 if batch.text_labels is None else batch.text_labels.shape[0]}

    def loss(
        self, output: ModelOutput, batch: PackedBatch, totals: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of ``output.token_nll`` divided by ``totals["mntp"]``, see ``LocalObjective.loss``.

        Raises:
            ValueError: if the head's rows cannot belong to this batch, or ``totals`` does not cover it.
        """
        labelled = self.counts(batch)[self.term]
        nll = output.token_nll
        require_rows(self.term, found=None if nll is None else nll.shape[0], labelled=labelled)
        local_sum = graph_zero(output) if nll is None else nll.float().sum()
        rows = 0 if nll is None else nll.shape[0]
        loss = share_of_total(local_sum, term=self.term, local_count=rows, totals=totals)
        return loss, {self.term: local_sum.detach()}
