"""The training loop of one stage. It knows objectives by their interface alone."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_cocoa.batch import PackedBatch
from megatron_cocoa.config import StageSettings, TrainSettings
from megatron_cocoa.model.build import Model
from megatron_cocoa.objectives import GlobalObjective, LocalObjective
from megatron_cocoa.training.log import StageLog
from megatron_cocoa.training.optimizer import build_optimizer
from megatron_cocoa.training.step import Metrics, forward_backward


class Loader(Protocol):
    """What feeds a stage: see ``megatron_cocoa.data.loader.StageLoader``."""

    def next_step(self) -> list[PackedBatch]:
        """This data-parallel rank's micro-batches of the next step."""


@dataclass(frozen=True)
class StageResult:
    """How a stage went.

    seconds: wall time of its steps.
    skipped: steps that were not applied because their loss or gradient was not finite.
    """

    seconds: float
    skipped: int


def train_stage(
    model: Model,
    objective: LocalObjective | GlobalObjective,
    loader: Loader,
    *,
    stage: StageSettings,
    settings: TrainSettings,
    log: StageLog,
) -> StageResult:
    """Run a stage's optimizer steps from the model's present weights, with a fresh optimizer.

    Args:
        model: chunks in Megatron's DDP.
        objective: of the stage.
        loader: gives the micro-batches.
        stage: steps, learning rate.
        settings: of the run.
        log: takes each step's metrics.

    Raises:
        FloatingPointError: after ten steps in a row whose loss or gradient was not finite, naming the samples.
    """
    optimizer, schedule = build_optimizer(model, stage, settings.optimizer, settings.parallel)
    model.train()
    skipped = in_a_row = 0
    started = time.perf_counter()
    for step in range(1, stage.steps + 1):
        begun = time.perf_counter()
        batches = loader.next_step()
        waited = time.perf_counter() - begun
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        schedule.step(increment=1)
        metrics = forward_backward(model, objective, batches)
        applied, grad_norm = _apply(optimizer, metrics)
        in_a_row = 0 if applied else in_a_row + 1
        skipped += not applied
        if in_a_row >= 10:
            raise FloatingPointError(_not_finite(step, metrics, grad_norm, batches))
        metrics |= {
            "grad_norm": grad_norm,
            "lr": schedule.get_lr({}),
            "tokens": float(sum(batch.num_tokens for batch in batches)),
            "data_wait": waited,
            "seconds": time.perf_counter() - begun,
        }
        log.step(step, metrics)
    if settings.parallel.overlap_param_gather:
        # The last update is gathered by the next forward pass only, and a checkpoint must not wait for one.
        for chunk in model.chunks:
            chunk.start_param_sync(force_sync=True)
    return StageResult(time.perf_counter() - started, skipped)


def _apply(optimizer, metrics: Metrics) -> tuple[bool, float]:
    """Step the optimizer unless loss or gradient norm, which all ranks know, is not finite: then all skip together.

    Megatron looks for infinities only where it scales the loss; in FP32 and BF16 it would clip them to NaN weights.
    """
    if not math.isfinite(metrics["loss"]):
        return False, math.nan
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return False, norm
    applied, grad_norm, _ = optimizer.step()
    return bool(applied), norm if grad_norm is None else float(grad_norm)


def _not_finite(step: int, metrics: Metrics, grad_norm: float, batches: Sequence[PackedBatch]) -> str:
    samples = [sample for batch in batches for sample in batch.sample_ids][:20]
    return (
        f"ten steps in a row, up to step {step}, had a loss or gradient that is not finite (loss {metrics['loss']}, "
        f"gradient norm {grad_norm}): lower the learning rate, or look at the samples of this step: {samples}"
    )

