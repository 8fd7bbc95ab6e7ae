"""Masked image reconstruction: the image decoder's pixels against the original ones, at masked units only.

A unit is one merged image unit (``spatial_merge_size**2`` patches), or one patch of it. The data layer chooses the
targets: pixels as the processor normalises them, or normalised per patch as in MAE (He et al., arXiv 2111.06377).
Source: CoCoA (arXiv 2603.01471), stage 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_cocoa.batch import MaskKind, ModelOutput, PackedBatch
from megatron_cocoa.objectives.base import graph_zero, require_mask_kind, require_rows, share_of_total


class MaeObjective:
    """Squared error per pixel value, averaged over the values of a unit and over the step's masked units.

    If a batch says which patches of its units are masked (``unit_patches``), the error is averaged over these patches
    instead: the decoder still predicts whole units, but its predictions of visible patches do not count. Units, and
    patches, all have the same number of values, so either average is the mean over all masked values.

    Args:
        mask_kind: attention under which the units are predicted.
    """

    name = "mae"
    term = "mae"

    def __init__(self, mask_kind: MaskKind = MaskKind.BIDIRECTIONAL) -> None:
        self.mask_kind = mask_kind
        self.weights: Mapping[str, float] = {self.term: 1.0}

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        """``{"mae": masked units, or patches}`` of the whole micro-batch, see ``LocalObjective.counts``."""
        require_mask_kind(self, batch)
        if batch.unit_patches is not None:
            return {self.term: int(batch.unit_patches.sum())}
        return {self.term: 0 if batch.unit_positions is None else batch.unit_positions.shape[0]}

    def loss(
        self, output: ModelOutput, batch: PackedBatch, totals: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the mean squared errors of local units, or patches, divided by ``totals["mae"]``; see
        ``LocalObjective.loss``.

        Raises:
            ValueError: if predictions and targets differ in shape, the decoder's rows cannot belong to this
                batch, or ``totals`` does not cover it.
        """
        require_mask_kind(self, batch)
        predicted = output.predicted_units
        rows = None if predicted is None else predicted.shape[0]
        labelled = 0 if batch.unit_positions is None else batch.unit_positions.shape[0]
        require_rows(self.term, found=rows, labelled=labelled)
        if predicted is None:
            local_sum = graph_zero(output)
        elif batch.unit_patches is None:
            local_sum = unit_errors(predicted, output.unit_targets).sum()
        else:
            # ``rows`` below counts units: counting patches would wait for the GPU, and a unit has at least one.
            local_sum = patch_errors(predicted, output.unit_targets, output.unit_patches).sum()
        loss = share_of_total(local_sum, term=self.term, local_count=rows or 0, totals=totals)
        return loss, {self.term: local_sum.detach()}


def unit_errors(predicted: Tensor, targets: Tensor | None) -> Tensor:
    """Mean squared error of each unit, float32 ``(units,)``.

    Args:
        predicted: ``(units, unit_dim)`` in any float dtype; the error is taken in float32.
        targets: the same shape.

    Raises:
        ValueError: if the shapes differ; broadcasting would hide it.
    """
    _require_same_shape(predicted, targets)
    return _MeanSquaredError.apply(predicted, targets, 1).squeeze(-1)


def patch_errors(predicted: Tensor, targets: Tensor | None, masked: Tensor | None) -> Tensor:
    """Mean squared error of each masked patch, float32 ``(units, patches)``, and zero at patches that are not masked.

    Args:
        predicted, targets: ``(units, patches * patch_dim)``, as ``unit_errors``.
        masked: bool ``(units, patches)``.

    Raises:
        ValueError: as ``unit_errors``, or if ``masked`` has other rows.
    """
    _require_same_shape(predicted, targets)
    if masked is None or masked.shape[0] != predicted.shape[0]:
        found = None if masked is None else tuple(masked.shape)
        raise ValueError(f"unit_patches of {predicted.shape[0]} predicted units has shape {found}: they must agree")
    # ``where`` and not a product: an overflow at a patch that does not count must not become NaN.
    return _MeanSquaredError.apply(predicted, targets, masked.shape[1]).where(masked, 0.0)


class _MeanSquaredError(torch.autograd.Function):
    """Mean squared error in ``parts`` equal parts of each row, float32 ``(rows, parts)``.

    Keeps only the difference and writes the gradient over it; autograd would keep five tensors of that size.
    """

    @staticmethod
    def forward(ctx, predicted: Tensor, targets: Tensor, parts: int) -> Tensor:
        difference = (predicted.float() - targets.float()).unflatten(-1, (parts, -1))
        ctx.save_for_backward(difference)
        ctx.dtype = predicted.dtype
        return torch.linalg.vector_norm(difference, dim=-1).square_().div_(difference.shape[-1])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (difference,) = ctx.saved_tensors
        difference.mul_((gradient * (2 / difference.shape[-1])).unsqueeze(-1))
        if difference.shape[1] > 1:
            # Parts that do not count get zero, also where the difference is infinite.
            difference.masked_fill_((gradient == 0).unsqueeze(-1), 0.0)
        return difference.flatten(-2).to(ctx.dtype), None, None


def _require_same_shape(predicted: Tensor, targets: Tensor | None) -> None:
    found = None if targets is None else tuple(targets.shape)
    if found != tuple(predicted.shape):
        raise ValueError(f"predicted_units has shape {tuple(predicted.shape)}, unit_targets {found}: they must agree")
