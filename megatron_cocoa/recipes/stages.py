"""The three stages one after the other: build, load, train, save, hand over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_cocoa.checkpoint.initial import load_initial_weights
from megatron_cocoa.checkpoint.store import CheckpointInfo, save_checkpoint
from megatron_cocoa.data.loader import StageLoader
from megatron_cocoa.model.build import Model, build_model
from megatron_cocoa.objectives import build_objective
from megatron_cocoa.parallel import topology
from megatron_cocoa.recipes.context import RunContext
from megatron_cocoa.settings import save_settings
from megatron_cocoa.training.data_parallel import wrap_data_parallel
from megatron_cocoa.training.log import StageLog
from megatron_cocoa.training.trainer import train_stage

AfterStage = Callable[[str, Model], None]
"""Called with the name of what has just been trained, while its model is in memory."""


@dataclass(frozen=True)
class StageSummary:
    """How one stage of a run went.

    name:       folder under the run's output: the stage, or ``baseline`` for contrastive learning alone.
    checkpoint: its weights, for the next stage.
    statistics: of the loader on the first data-parallel rank.
    """

    name: str
    stage: str
    checkpoint: Path
    seconds: float
    skipped: int
    statistics: dict[str, float]


def build_with_weights(context: RunContext, *, checkpoint: Path | None, with_image_decoder: bool) -> Model:
    """The model at the run's layout with its initial weights, not yet wrapped for training.

    Args:
        context: of the run.
        checkpoint: weights of the previous stage; None starts where the run starts.
        with_image_decoder: stage ``warmup`` needs it.
    """
    model = build_model(
        context.architecture,
        context.settings,
        with_image_decoder=with_image_decoder,
        mask_token_id=context.bundle.mask_token_id,
    )
    load_initial_weights(model.chunks, context.table, context.weight_source(checkpoint))
    return model


def run_stage(
    context: RunContext,
    stage: str,
    *,
    checkpoint: Path | None,
    name: str | None = None,
    after: AfterStage | None = None,
) -> StageSummary:
    """Train one stage and save its weights under ``output/<name>/checkpoint``.

    Args:
        context: of the run.
        stage: one of ``config.STAGES``.
        checkpoint: the previous stage's weights; None starts where the run starts.
        name: of its folder, the stage's own by default.
        after: called while the trained model is in memory.
    """
    settings, name = context.settings, name or stage
    stage_settings = settings.stage(stage)
    check_microbatches(context, stage)
    loader = build_loader(context, stage)
    bare = build_with_weights(context, checkpoint=checkpoint, with_image_decoder=stage == "warmup")
    model = wrap_data_parallel(bare, settings.parallel)
    folder = context.output / name
    log = StageLog(
        folder,
        stage=name,
        steps=stage_settings.steps,
        is_writer=topology.is_first_rank(),
        interval=settings.log_interval,
    )
    try:
        result = train_stage(
            model, build_objective(stage, settings), loader, stage=stage_settings, settings=settings, log=log
        )
    finally:
        log.close()
        loader.close()
    info = CheckpointInfo(
        stage=stage,
        step=stage_settings.steps,
        mask_token_id=context.bundle.mask_token_id,
        bridge_token_id=context.bundle.bridge_token_id,
        hf_config=context.hf_config,
        loader=loader.state_dict(),
    )
    save_checkpoint(folder / "checkpoint", model.bare_chunks, info)
    if topology.is_first_rank():
        save_settings(settings, folder / "settings.yaml")
    if after is not None:
        after(name, model)
    return StageSummary(
        name=name,
        stage=stage,
        checkpoint=folder / "checkpoint",
        seconds=result.seconds,
        skipped=result.skipped,
        statistics=loader.statistics(),
    )


def build_loader(context: RunContext, stage: str) -> StageLoader:
    """The loader of a stage for this rank."""
    return StageLoader(
        stage,
        context.settings,
        bundle=context.bundle,
        vision=context.geometry,
        data_parallel_rank=topology.data_parallel_rank(),
        data_parallel_size=topology.data_parallel_size(),
        needs_pixels=topology.is_pipeline_first_stage(),
        needs_unit_targets=topology.is_pipeline_last_stage(),
        pad_to_multiple_of=context.pad_to_multiple_of,
    )


def check_microbatches(context: RunContext, stage: str) -> None:
    """Refuse batch sizes that the layout cannot run.

    Raises:
        ValueError: if the global batch does not divide, or an interleaved pipeline gets too few micro-batches.
    """
    parallel = context.settings.parallel
    number = context.settings.stage(stage).num_microbatches(topology.data_parallel_size())
    stages = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size and number % stages:
        raise ValueError(
            f"stage {stage} has {number} micro-batches a rank: an interleaved pipeline of {stages} stages needs a "
            f"multiple of {stages}; change {stage}.global_batch_size or {stage}.micro_batch_size"
        )
