"""The training loop of one stage. It knows objectives by their interface alone."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cocoa.batch import PackedBatch
from megatron_cocoa.checkpoint.info import CheckpointInfo
from megatron_cocoa.config import StageSettings, TrainSettings
from megatron_cocoa.model.build import Model
from megatron_cocoa.model.schedule import microbatches_ahead
from megatron_cocoa.model.workload import Workload
from megatron_cocoa.objectives import GlobalObjective, LocalObjective
from megatron_cocoa.parallel import device
from megatron_cocoa.parallel.collectives import on_first_rank
from megatron_cocoa.parallel.device_memory import memory_bytes
from megatron_cocoa.parallel.random_states import seed_everything
from megatron_cocoa.training.agreement import all_equal, powers
from megatron_cocoa.training.data_parallel import gather_parameters, whole_parameters
from megatron_cocoa.training.optimizer import build_optimizer, round_from_master_weights
from megatron_cocoa.training.progress import Progress
from megatron_cocoa.training.spikes import highest_norm, remember
from megatron_cocoa.training.stage_checkpoints import StageCheckpoints
from megatron_cocoa.training.step import Metrics, forward_backward
from megatron_cocoa.training.stopping import StopWatch
from megatron_cocoa.training.throughput import SpeedMeter


class Loader(Protocol):
    """Feeds a stage: see ``megatron_cocoa.data.loader.StageLoader``."""

    def next_step(self) -> list[PackedBatch]:
        """This data-parallel rank's micro-batches of the next step."""

    def state_dict(self) -> dict[str, Any]:
        """Its place in the stream of samples, the same on every rank."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from such a place."""

    def num_skipped(self) -> int:
        """Samples of this data-parallel rank that could not be used, since the start of the process."""

    def plan_digest(self) -> int:
        """63-bit digest of how the last step's samples were divided over all ranks, to see that ranks agree on it."""


class Log(Protocol):
    """Records each step's metrics: see ``megatron_cocoa.training.log.StageLog``."""

    def step(self, step: int, metrics: Metrics) -> None:
        """Record one step, counted from 1."""

    def skipped(self, step: int, why: str) -> None:
        """Tell people why a step was not applied."""

    def validation(self, step: int, metrics: Metrics) -> None:
        """Record what a validation after ``step`` found."""


class Validation(Protocol):
    """Measures every ``interval`` steps how good the model is: see ``megatron_cocoa.recipes.validation``."""

    interval: int
    metric: str

    def measure(self, model: Model) -> Metrics:
        """Metrics by name, among them ``metric``, of which higher is better; every rank calls it."""


@dataclass(frozen=True)
class StageKeeping:
    """What a stage needs to be resumable.

    checkpoints:   writes and finds them.
    info:          describes the model; the trainer fills in step, loader and progress.
    save_interval: steps between two checkpoints; None writes one only when the run is stopped.
    resume_step:   continue from this step's checkpoint; None starts from the model's present weights.
    stop:          tells when to stop; None never stops.
    """

    checkpoints: StageCheckpoints
    info: CheckpointInfo
    save_interval: int | None = None
    resume_step: int | None = None
    stop: StopWatch | None = None


@dataclass(frozen=True)
class StageResult:
    """How a stage went.

    progress: its counters.
    stopped:  why it ended before its last step, after writing a checkpoint; None if it is complete.
    """

    progress: Progress
    stopped: str | None = None


def train_stage(
    model: Model,
    objective: LocalObjective | GlobalObjective,
    loader: Loader,
    *,
    stage: StageSettings,
    settings: TrainSettings,
    log: Log,
    keeping: StageKeeping | None = None,
    validation: Validation | None = None,
    meter: SpeedMeter | None = None,
) -> StageResult:
    """Run a stage's optimizer steps, with a fresh optimizer or from a checkpoint of the stage.

    Args:
        model: chunks in Megatron's DDP, with the weights to start from.
        objective: of the stage.
        loader: gives the micro-batches.
        stage: steps, learning rate.
        settings: of the run.
        log: takes each step's metrics.
        keeping: checkpoints; None writes none.
        validation: measured every ``validation.interval`` steps; with ``keeping`` the best weights are saved.
        meter: adds speed and utilisation to each step's metrics.

    Raises:
        FloatingPointError: after ``optimizer.max_skipped_steps`` steps in a row that had to be skipped, naming samples.
        ValueError: if a checkpoint cannot be written or loaded, ranks disagree on a step's samples, or the loader
            refuses the data.
    """
    trainer = _StageTrainer(
        model, objective, loader, stage=stage, settings=settings, keeping=keeping, meter=meter
    )
    progress = trainer.progress

    def validate_if_due() -> None:
        if validation is not None and progress.step % validation.interval == 0 and progress.step != progress.validated:
            log.validation(progress.step, trainer.validate(validation))

    # An earlier process that was stopped left out the validation of its last step.
    validate_if_due()
    while progress.step < stage.steps:
        log.step(progress.step + 1, trainer.step())
        if trainer.why_skipped is not None:
            log.skipped(progress.step, trainer.why_skipped)
        reason = trainer.reason_to_stop()
        if reason is None:
            # A stop has to be quick: whoever sent the signal kills the run soon after.
            validate_if_due()
        trainer.keep(is_stopping=reason is not None)
        if reason is not None:
            return StageResult(progress, reason)
    trainer.finish()
    return StageResult(progress)


class _StageTrainer:
    """What ``train_stage`` keeps from step to step, and the parts of its loop."""

    def __init__(
        self,
        model: Model,
        objective: LocalObjective | GlobalObjective,
        loader: Loader,
        *,
        stage: StageSettings,
        settings: TrainSettings,
        keeping: StageKeeping | None,
        meter: SpeedMeter | None,
    ) -> None:
        self.model, self.objective, self.loader = model, objective, loader
        self.stage, self.settings, self.keeping, self.meter = stage, settings, keeping, meter
        self.optimizer, self.schedule = build_optimizer(model, stage, settings.optimizer, settings.parallel)
        self.progress = Progress()
        self.why_skipped: str | None = None
        if keeping is not None and keeping.resume_step is not None:
            self._resume(keeping.checkpoints, keeping.resume_step)
        model.train()

    def _resume(self, checkpoints: StageCheckpoints, step: int) -> None:
        info = checkpoints.load(step, self.model, self.optimizer)
        if self.settings.model.fp8_param:
            round_from_master_weights(self.model, self.optimizer)
        self.progress = Progress.from_dict(info.progress)
        self.loader.load_state_dict(info.loader)
        self.schedule.step(increment=step)

    def step(self) -> Metrics:
        """One optimizer step, which all ranks skip if it is not finite or stands out; ``why_skipped`` then says so.

        Returns:
            Its metrics; apart from times and memory they are the same on every rank.
        """
        begun, progress = time.perf_counter(), self.progress
        # Dropout depends on the step and not on earlier draws, so no random state needs to be saved.
        place = parallel_state.get_data_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
        seed_everything(self.settings.seed, progress.step, *place)
        batches = self.loader.next_step()
        waited = time.perf_counter() - begun
        for chunk in self.model.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.schedule.step(increment=1)
        is_logged = (progress.step + 1) % self.settings.log_interval == 0
        metrics = forward_backward(self.model, self.objective, batches, detailed=is_logged)
        limit = highest_norm(progress.recent_norms, self.settings.optimizer.max_norm_ratio)
        applied, grad_norm = _apply(self.optimizer, metrics, limit)
        workload, skipped_samples = self._whole_step(batches)
        seconds = time.perf_counter() - begun
        self._count(applied, tokens=workload.tokens, seconds=seconds)
        progress.data_wait += waited
        if applied:
            remember(progress.recent_norms, grad_norm)
        self.why_skipped = None if applied else _why_skipped(metrics, grad_norm, limit, batches)
        if progress.skipped_in_a_row >= self.settings.optimizer.max_skipped_steps:
            raise FloatingPointError(
                f"{progress.skipped_in_a_row} steps in a row (optimizer.max_skipped_steps), up to step {progress.step} "
                f"were skipped: lower the learning rate, or look into the last one: {self.why_skipped}"
            )
        return metrics | {
            "grad_norm": grad_norm,
            "lr": self.schedule.get_lr({}),
            "tokens": workload.tokens,
            **self._speed(workload, seconds, num_microbatches=len(batches)),
            "skipped_steps": progress.skipped,
            "skipped_samples": skipped_samples,
            "memory_gib": memory_bytes() / 2**30,
            "data_wait": waited,
            "seconds": seconds,
        }

    def _whole_step(self, batches: Sequence[PackedBatch]) -> tuple[Workload, int]:
        """Over all data-parallel ranks: the work in the step's packs, and the samples skipped so far.

        Raises:
            ValueError: on all ranks of the world, if replicas divided the step's samples over ranks differently.
        """
        vision = self.model.architecture.vision
        counts = sum((Workload.of(batch, vision) for batch in batches), Workload()).counts()
        own = [*counts.values(), self.loader.num_skipped(), *powers(self.loader.plan_digest())]
        total = torch.tensor(own, dtype=torch.int64, device=device.device())
        group = parallel_state.get_data_parallel_group()
        dist.all_reduce(total, group=group)
        sums = total.tolist()
        *numbers, skipped = sums[: len(counts) + 1]
        if not all_equal(sums[len(counts) + 1 :], group.size()):
            raise ValueError(
                f"the data-parallel ranks do not agree on the samples of step {self.progress.step + 1}: some were left "
                f"out or taken twice. A rank could not read a picture's header that another could, or read another "
                f"size: see that every host has the same files, and go on from the last checkpoint"
            )
        return Workload.from_counts(dict(zip(counts, numbers))), skipped

    def _speed(self, workload: Workload, seconds: float, *, num_microbatches: int) -> Metrics:
        if self.meter is None:
            return {}
        # Gradient caching runs micro-batches forward twice, of which only one run counts as useful.
        is_cached = isinstance(self.objective, GlobalObjective)
        twice = microbatches_ahead(num_microbatches, num_chunks=len(self.model.chunks)) if is_cached else 0
        return self.meter.metrics(
            workload,
            samples=self.stage.global_batch_size,
            seconds=seconds,
            extra_forward_passes=twice / num_microbatches,
        )

    def _count(self, applied: bool, *, tokens: int, seconds: float) -> None:
        progress = self.progress
        progress.step += 1
        progress.skipped += not applied
        progress.skipped_in_a_row = 0 if applied else progress.skipped_in_a_row + 1
        progress.samples += self.stage.global_batch_size
        progress.tokens += tokens
        progress.seconds += seconds

    def validate(self, validation: Validation) -> Metrics:
        """Measure, and keep the weights if they are the best so far."""
        progress = self.progress
        progress.validated = progress.step
        with whole_parameters(self.model):
            measured = validation.measure(replace(self.model, chunks=self.model.bare_chunks))
            # All ranks must save or none, and another processor may round differently: the first rank's numbers decide.
            metrics = on_first_rank(lambda: measured)
            value = metrics[validation.metric]
            if progress.best_value is None or value > progress.best_value:
                progress.best_value, progress.best_step = value, progress.step
                if self.keeping is not None:
                    self.keeping.checkpoints.save_best(self.model, self._info())
        self.model.train()
        return metrics

    def reason_to_stop(self) -> str | None:
        """Why the run must stop after this step, the same on all ranks; None to continue, and after the last step."""
        if self.keeping is None or self.keeping.stop is None:
            return None
        reason = self.keeping.stop.reason()
        return None if self.progress.step == self.stage.steps else reason

    def keep(self, *, is_stopping: bool) -> None:
        """Write a checkpoint if one is due; none after the last step, whose weights are handed over instead."""
        keeping, step = self.keeping, self.progress.step
        if keeping is None:
            return
        keeping.checkpoints.poll()
        is_due = keeping.save_interval is not None and step % keeping.save_interval == 0
        if is_stopping or (is_due and step != self.stage.steps):
            with whole_parameters(self.model):
                keeping.checkpoints.save(self.model, self.optimizer, self._info())
        if is_stopping:
            keeping.checkpoints.wait()

    def finish(self) -> None:
        """After the last step: gather the last update's weights, and wait for a background write."""
        gather_parameters(self.model)
        if self.keeping is not None:
            self.keeping.checkpoints.wait()

    def _info(self) -> CheckpointInfo:
        return replace(
            self.keeping.info,
            step=self.progress.step,
            loader=self.loader.state_dict(),
            progress=self.progress.as_dict(),
        )


def _apply(optimizer, metrics: Metrics, limit: float) -> tuple[bool, float]:
    """Step the optimizer unless loss or gradient norm, which all ranks know, is not finite or the norm above ``limit``:
    then all skip together.

    Megatron looks for infinities only where it scales the loss; in FP32 and BF16 it would clip them to NaN weights.
    """
    if not math.isfinite(metrics["loss"]):
        return False, math.nan
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm) or norm > limit:
        return False, norm
    applied, grad_norm, _ = optimizer.step()
    return bool(applied), norm if grad_norm is None else float(grad_norm)


def _why_skipped(metrics: Metrics, grad_norm: float, limit: float, batches: Sequence[PackedBatch]) -> str:
    """Why a step was not applied, with samples of all ranks; every rank calls it."""
    samples: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(samples, [sample for batch in batches for sample in batch.sample_ids])
    found = list(dict.fromkeys(sample for part in samples for sample in part))
    if math.isfinite(metrics["loss"]) and math.isfinite(grad_norm):
        why = f"gradient norm {grad_norm:.4g} is above {limit:.4g}, optimizer.max_norm_ratio times the usual"
    else:
        why = f"loss or gradient is not finite (loss {metrics['loss']}, gradient norm {grad_norm})"
    more = f" and {len(found) - 20} more" if len(found) > 20 else ""
    return f"{why}; samples of this step: {', '.join(found[:20])}{more}"
