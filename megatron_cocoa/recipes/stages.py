"""One stage of a run: build the model, load its weights, train, save, and hand over to the next stage.

The order of the stages, and what is measured between them, is in ``recipes/run.py``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist

from megatron_cocoa.checkpoint.info import CheckpointInfo
from megatron_cocoa.checkpoint.store import save_checkpoint
from megatron_cocoa.checkpoint.writer import CheckpointWriter
from megatron_cocoa.conversion.picture_sizes import SIZES
from megatron_cocoa.data.feed import lost_workers_explained
from megatron_cocoa.data.loader import StageLoader
from megatron_cocoa.data.replica import ReplicaLoader
from megatron_cocoa.model.build import Model
from megatron_cocoa.objectives import build_objective
from megatron_cocoa.parallel import device, topology
from megatron_cocoa.parallel.collectives import on_first_rank
from megatron_cocoa.recipes.adapters import add_adapters, hand_over_adapters
from megatron_cocoa.recipes.context import RunContext
from megatron_cocoa.recipes.initial_model import build_with_weights, build_without_weights
from megatron_cocoa.recipes.output_folder import STAGE_CHECKPOINT, STEP_CHECKPOINTS
from megatron_cocoa.recipes.stage_checks import check_microbatches
from megatron_cocoa.recipes.stage_loader import build_loader
from megatron_cocoa.recipes.stage_summary import StageSummary, over_replicas
from megatron_cocoa.recipes.validation import HeldOutValidation
from megatron_cocoa.settings.saved import SETTINGS_FILE, save_settings
from megatron_cocoa.training.data_parallel import wrap_data_parallel
from megatron_cocoa.training.log import StageLog
from megatron_cocoa.training.stage_checkpoints import StageCheckpoints
from megatron_cocoa.training.stopping import StopWatch
from megatron_cocoa.training.throughput import SpeedMeter
from megatron_cocoa.training.trainer import StageKeeping, train_stage

AfterStage = Callable[[str, Model], None]
"""Called with the name of a stage that has just been trained, while its model is in memory."""


def run_stage(
    context: RunContext,
    stage: str,
    *,
    checkpoint: Path | None,
    loader: StageLoader | ReplicaLoader | None = None,
    name: str | None = None,
    resume_step: int | None = None,
    stop: StopWatch | None = None,
    after: AfterStage | None = None,
) -> StageSummary:
    """Train one stage and save its weights under ``output/<name>/checkpoint``.

    Args:
        context: of the run.
        stage: one of ``config.STAGES``.
        checkpoint: the previous stage's weights; None takes those that the run starts from.
        loader: of ``build_loader``, at its first step; closed at the end. None builds one.
        name: of its folder, the stage's own by default.
        resume_step: resume from the stage's own checkpoint of this step.
        stop: tells when to end before the last step.
        after: called while the trained model is in memory, once the stage is complete.

    Raises:
        ValueError: for batch sizes that the layout cannot run, and as the loader, the model and ``train_stage`` do.
        FloatingPointError: as ``train_stage``.
    """
    settings, name = context.settings, name or stage
    stage_settings, folder = settings.stage(stage), context.output / name
    check_microbatches(context, stage)
    loader = loader or build_loader(context, stage)
    if topology.is_first_rank():
        samples, rows = stage_settings.steps * stage_settings.global_batch_size, loader.state_dict()["num_rows"]
        print(f"Stage {name}: {stage_settings.steps} steps, {samples / rows:.2f} epochs of {rows:,} rows", flush=True)
    bare = _initial_model(context, stage, checkpoint, is_resumed=resume_step is not None)
    meter = _speed_meter(context, *add_adapters(context, bare, name))
    model = wrap_data_parallel(bare, settings.parallel)
    info = _describe_checkpoint(context, stage)
    log = _open_log(context, folder, stage_settings.steps, done=resume_step or 0, stop=stop)
    try:
        with lost_workers_explained():
            result = train_stage(
                model,
                build_objective(stage, settings),
                loader,
                stage=stage_settings,
                settings=settings,
                log=log,
                keeping=_keeping(context, folder, info, resume_step, stop),
                validation=_validation(context, stage),
                meter=meter,
            )
    finally:
        log.close()
        loader.close()
    summary = StageSummary(
        name,
        stage,
        folder / STAGE_CHECKPOINT,
        result.progress,
        over_replicas(loader.statistics()),
        stopped=result.stopped,
    )
    if result.stopped is None:
        hand_over_adapters(context, model, folder, checkpoint=checkpoint)
        _hand_over(context, summary, model, replace(info, step=stage_settings.steps, loader=loader.state_dict()))
        if after is not None:
            after(name, model)
    return summary


def _initial_model(context: RunContext, stage: str, checkpoint: Path | None, *, is_resumed: bool) -> Model:
    parts = dict(
        with_image_decoder=stage == "warmup", learned_temperature=context.settings.learned_temperature(stage)
    )
    if is_resumed:
        # The trainer loads them, together with the optimizer's state.
        return build_without_weights(context, **parts)
    return build_with_weights(context, checkpoint=checkpoint, **parts)


def _open_log(context: RunContext, folder: Path, steps: int, *, done: int, stop: StopWatch | None) -> StageLog:
    return StageLog(
        folder,
        stage=folder.name,
        steps=steps,
        is_writer=topology.is_first_rank(),
        interval=context.settings.log_interval,
        done=done,
        wandb_project=context.settings.wandb_project,
        # Written by one rank alone: the others hear of it when all ask whether to stop.
        on_failure=None if stop is None else stop.fail,
        check_owner=context.owner.check,
    )


def _describe_checkpoint(context: RunContext, stage: str) -> CheckpointInfo:
    sized = context.settings.stage(stage)
    return CheckpointInfo(
        stage=stage,
        step=0,
        mask_token_id=context.bundle.mask_token_id,
        bridge_token_id=context.bundle.bridge_token_id,
        hf_config=context.hf_config,
        pictures={name: getattr(sized, name) for name in SIZES},
        **asdict(sized.embedding_form),
    )


def _keeping(
    context: RunContext, folder: Path, info: CheckpointInfo, resume_step: int | None, stop: StopWatch | None
) -> StageKeeping:
    checkpoint = context.settings.checkpoint
    return StageKeeping(
        checkpoints=StageCheckpoints(
            folder / STEP_CHECKPOINTS,
            keep=checkpoint.keep,
            asynchronous=checkpoint.asynchronous,
            check_owner=context.owner.check,
        ),
        info=info,
        save_interval=checkpoint.save_interval,
        resume_step=resume_step,
        stop=stop,
    )


def _speed_meter(context: RunContext, language_adapters: int, vision_adapters: int) -> SpeedMeter:
    return SpeedMeter(
        context.architecture,
        context.settings,
        num_gpus=dist.get_world_size(),
        device_name=device.device_name(),
        language_adapter_parameters=language_adapters,
        vision_adapter_parameters=vision_adapters,
    )


def _validation(context: RunContext, stage: str) -> HeldOutValidation | None:
    if context.settings.validation.interval is None:
        return None
    return HeldOutValidation(context, stage=stage)


def _hand_over(context: RunContext, summary: StageSummary, model: Model, info: CheckpointInfo) -> None:
    """Save a complete stage's summary and settings and then its weights, which mark it as complete."""
    folder = summary.checkpoint.parent

    def describe() -> None:
        context.owner.check()
        summary.save(folder)
        save_settings(context.settings, folder / SETTINGS_FILE)

    on_first_rank(describe, f"cannot write to {folder}, free space on its disk and resume the run", is_long=True)
    writer = CheckpointWriter(check_owner=context.owner.check)
    save_checkpoint(summary.checkpoint, model.bare_chunks, info, writer=writer)
    if topology.is_first_rank():
        # Nobody resumes a stage that is complete, and optimizer states are three quarters of what a run stores.
        shutil.rmtree(folder / STEP_CHECKPOINTS, ignore_errors=True)
