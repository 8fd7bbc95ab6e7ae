"""What shows that the reconstruction stages work.

Stage ``bridge``: block B's loss beside its own block A and beside another sample's; the difference is what the bridge
carries. Stage ``warmup``: pictures with masked units, filled in by the image decoder.
"""

from __future__ import annotations

import torch

from megatron_cocoa.batch import MaskKind, PackedBatch
from megatron_cocoa.data.collate import collate_warmup
from megatron_cocoa.data.evaluation_batches import bridge_batches
from megatron_cocoa.data.prepared import CorruptionSettings
from megatron_cocoa.data.preprocess import load_processor
from megatron_cocoa.data.rows import IMAGE_TOKEN, CaptionRow, Content, PairRow
from megatron_cocoa.data.sources import read_captions
from megatron_cocoa.evaluation.pictures import encode_png, patches_to_picture
from megatron_cocoa.evaluation.probes import predict_units, sample_losses
from megatron_cocoa.evaluation.report_data import BridgeEvidence, Reconstruction
from megatron_cocoa.model.build import Model
from megatron_cocoa.recipes.context import RunContext, evaluation_parts, pool_files


def pool_rows(context: RunContext, pool: str, limit: int) -> list[CaptionRow]:
    """Up to ``limit`` rows of a retrieval pool, spread over its file; empty where the data folder has none."""
    path = pool_files(context.settings.data.path).get(pool)
    if path is None:
        return []
    rows = read_captions(path).rows
    num = min(limit, len(rows))
    return [rows[i * len(rows) // num] for i in range(num)]


def bridge_evidence(context: RunContext, model: Model, *, pool: str, label: str) -> BridgeEvidence | None:
    """Block B's loss on up to 256 pictures of a pool, with its own block A and with another sample's.

    The same tokens of B are masked both times, so the difference is what B reads from A through the bridge. None if the
    pool has fewer than two pictures.
    """
    stage = context.settings.bridge
    pictures = pool_rows(context, pool, 256)
    rows = [PairRow(r.row_id, Content(IMAGE_TOKEN, r.image_path), Content(r.caption, "")) for r in pictures]
    if len(rows) < 2:
        return None
    builder, options = evaluation_parts(context, stage)
    # Block A is seen whole, whatever ``query_unit_mask_ratio`` hides of it in training.
    corruption = CorruptionSettings(
        seed=context.settings.seed, text_mask_ratio=stage.target_mask_ratio, eligible_tokens=stage.eligible_tokens
    )
    kind = MaskKind.of_bridge_stage(bridge_sees_target=stage.bridge_sees_target)
    own, other = (
        sample_losses(
            model,
            bridge_batches(
                rows,
                builder=builder,
                options=options,
                corruption=corruption,
                mask_kind=kind,
                batch_size=32,
                swapped=swapped,
            ),
        )
        for swapped in (False, True)
    )
    measured = [i for i, count in enumerate(own.num_tokens) if count]
    return BridgeEvidence(
        model=label,
        own_nll=tuple(own.nll[i] for i in measured),
        other_nll=tuple(other.nll[i] for i in measured),
        num_tokens=tuple(own.num_tokens[i] for i in measured),
        num_visible=tuple(own.num_visible[i] for i in measured),
    )


def reconstructions(context: RunContext, model: Model) -> list[Reconstruction]:
    """Up to six held-out pictures, masked as stage ``warmup`` masks them and filled in by the image decoder.

    None of them under ``mae_target normalized``, whose predictions are no pixels.
    """
    stage = context.settings.warmup
    rows = pool_rows(context, "heldout", 6)
    if not rows or stage.mae_target != "pixels":
        return []
    builder, options = evaluation_parts(context, stage)
    corruption = CorruptionSettings.of_warmup(stage, seed=context.settings.seed)
    batch = collate_warmup([builder.warmup(row, corruption, epoch=0, step=0) for row in rows], options)
    return _pictures(context, rows, batch, predict_units(model, batch))


def _pictures(
    context: RunContext, rows: list[CaptionRow], batch: PackedBatch, predicted: torch.Tensor
) -> list[Reconstruction]:
    """Cut the pack's patches into pictures and paste predictions and originals over the masked units."""
    per_unit = context.architecture.vision.patches_per_unit
    units = batch.pixel_values.reshape(-1, per_unit * batch.pixel_values.shape[1]).float()
    unit_of_row = {int(row): unit for unit, row in enumerate(batch.feature_positions)}
    masked_units = torch.tensor([unit_of_row[int(row)] for row in batch.unit_positions])
    original, filled = units.clone(), units.clone()
    if batch.unit_patches is not None:
        # Visible patches stay as they are.
        seen = ~batch.unit_patches.repeat_interleave(batch.pixel_values.shape[1], dim=1)
        predicted = predicted.where(~seen, batch.unit_targets.float())
    original[masked_units], filled[masked_units] = batch.unit_targets.float(), predicted
    draw = _painter(context)
    found, start = [], 0
    for row, grid in zip(rows, batch.grid_thw):
        end = start + grid[0] * grid[1] * grid[2] // per_unit
        here = (masked_units >= start) & (masked_units < end)
        error = _mean_error(predicted[here], batch, here) if here.any() else None
        masked, reconstructed, true = (draw(x[start:end], grid) for x in (units, filled, original))
        found.append(Reconstruction(row.caption, masked, reconstructed, true, None if error is None else float(error)))
        start = end
    return found


def _mean_error(predicted: torch.Tensor, batch: PackedBatch, here: torch.Tensor) -> torch.Tensor:
    """Squared error per hidden value of the units that ``here`` chooses."""
    squares = (predicted - batch.unit_targets[here].float()).square()
    if batch.unit_patches is None:
        return squares.mean()
    # Where a patch was seen, prediction and target are equal by now.
    return squares.sum() / (batch.unit_patches[here].sum() * batch.pixel_values.shape[1])


def _painter(context: RunContext):
    processor, vision = load_processor(context.settings.model.path), context.architecture.vision

    def draw(units: torch.Tensor, grid: tuple[int, int, int]) -> bytes:
        picture = patches_to_picture(
            units.reshape(-1, vision.patch_dim),
            grid_thw=grid,
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            spatial_merge_size=vision.spatial_merge_size,
            image_mean=processor.image_mean,
            image_std=processor.image_std,
        )
        return encode_png(picture)

    return draw
