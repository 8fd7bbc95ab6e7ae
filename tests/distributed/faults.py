"""Checks of faults: what all ranks do when one rank's data spoil the loss."""

from __future__ import annotations

import errno
import functools
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_cocoa.config import OptimizerSettings, ParallelSettings
from megatron_cocoa.data.decode import PictureError
from megatron_cocoa.objectives import build_objective
from megatron_cocoa.parallel import topology
from megatron_cocoa.recipes.context import prepare_context
from megatron_cocoa.recipes.initial_model import build_with_weights
from megatron_cocoa.recipes.run import _is_resumed
from megatron_cocoa.recipes.stage_loader import build_loader
from megatron_cocoa.recipes.stage_summary import StageSummary
from megatron_cocoa.recipes.stages import run_stage
from megatron_cocoa.settings.saved import SETTINGS_FILE, save_settings
from megatron_cocoa.training import spikes
from megatron_cocoa.training.data_parallel import wrap_data_parallel
from megatron_cocoa.training.log import METRICS_FILE
from megatron_cocoa.training.stopping import StopWatch
from megatron_cocoa.training.trainer import train_stage
from tests.distributed.check import Check, degrees
from tests.distributed.folders import rank_folders
from tests.distributed.tiny_run import tiny_settings, write_folders

STEPS, IN_A_ROW = 6, 3


class _Poisoned:
    """A loader whose first pixel is NaN at some steps, on the last data-parallel rank."""

    def __init__(self, loader, steps: set[int]) -> None:
        self.loader, self.steps, self.step = loader, steps, 0

    def next_step(self):
        self.step += 1
        batches = list(self.loader.next_step())
        is_last = topology.data_parallel_rank() == topology.data_parallel_size() - 1
        if self.step in self.steps and is_last and batches[0].pixel_values is not None:
            pixels = batches[0].pixel_values.clone()
            pixels[0, 0] = float("nan")
            batches[0] = replace(batches[0], pixel_values=pixels)
        return batches

    def num_skipped(self) -> int:
        return 0

    def plan_digest(self) -> int:
        return self.loader.plan_digest()


class _Outlier:
    """A loader whose masked pixels are 100,000 times as large in one step, on the last data-parallel rank."""

    def __init__(self, loader, step: int) -> None:
        self.loader, self.at, self.step = loader, step, 0

    def next_step(self):
        self.step += 1
        batches = list(self.loader.next_step())
        is_last = topology.data_parallel_rank() == topology.data_parallel_size() - 1
        if self.step == self.at and is_last and batches[0].unit_targets is not None:
            batches[0] = replace(batches[0], unit_targets=100_000 * batches[0].unit_targets)
        return batches

    def __getattr__(self, name: str):
        return getattr(self.loader, name)


class _Misread:
    """A loader whose reader on the last data-parallel rank cannot read a header in one step that others can."""

    def __init__(self, loader, step: int) -> None:
        self.loader, self.at, self.step = loader, step, 0

    def next_step(self):
        self.step += 1
        reader = getattr(self.loader, "_reader", self.loader)
        is_last = topology.data_parallel_rank() == topology.data_parallel_size() - 1
        if self.step == self.at and is_last and reader is not None:
            pictures = reader._planner._builder.pictures
            planned_grid = pictures.planned_grid

            def refused(image_path):
                pictures.planned_grid = planned_grid
                raise PictureError("unreadable_picture", f"{image_path}: Input/output error")

            pictures.planned_grid = refused
        return self.loader.next_step()

    def __getattr__(self, name: str):
        return getattr(self.loader, name)


class _Weights:
    """Whether a step changed any weight of this rank, and what was reported of it."""

    def __init__(self, model) -> None:
        self.model, self.before = model, self._copy(model)
        self.changed: list[bool] = []
        self.num_skipped: list[float] = []
        self.reasons: list[str] = []

    @staticmethod
    def _copy(model) -> list[torch.Tensor]:
        return [p.detach().clone() for chunk in model.bare_chunks for p in chunk.parameters()]

    def step(self, step: int, metrics: dict[str, float]) -> None:
        now = self._copy(self.model)
        self.changed.append(any(not torch.equal(a, b) for a, b in zip(self.before, now)))
        self.num_skipped.append(metrics["skipped_steps"])
        self.before = now

    def skipped(self, step: int, why: str) -> None:
        self.reasons.append(f"step {step}: {why}")


def _run(stage: str, wrap: Callable[[object], object], degrees: dict) -> tuple[_Weights, str]:
    """What a run did to this rank's weights, and the error that ended it; ``wrap`` spoils its loader."""
    parallel = ParallelSettings(**degrees)
    topology.set_layout(parallel, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        write_folders(Path(folder))
        settings = tiny_settings(Path(folder), steps=STEPS, parallel=parallel)
        settings = replace(settings, optimizer=OptimizerSettings(max_skipped_steps=IN_A_ROW, max_norm_ratio=10.0))
        context = prepare_context(settings)
        model = build_with_weights(context, checkpoint=None, with_image_decoder=stage == "warmup")
        model = wrap_data_parallel(model, parallel)
        loader, weights, error = wrap(build_loader(context, stage)), _Weights(model), ""
        try:
            train_stage(
                model,
                build_objective(stage, settings),
                loader,
                stage=settings.stage(stage),
                settings=settings,
                log=weights,
            )
        except (FloatingPointError, ValueError) as found:
            error = f"{type(found).__name__}: {found}"
    return weights, error


def _gathered(names: tuple[str, ...], values: tuple) -> dict:
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    return dict(zip(names, (list(column) for column in zip(*everyone))))


def poisoned(stage: str, steps: set[int], **degrees) -> dict:
    """What each step did to each rank's weights, and how the run ended."""
    weights, error = _run(stage, lambda loader: _Poisoned(loader, steps), degrees)
    found = weights.changed, weights.num_skipped, weights.reasons, error
    return _gathered(("changed", "skipped", "reasons", "messages"), found)


def outlier(step: int, **degrees) -> dict:
    """As ``poisoned``, for a step of stage ``warmup`` with a gradient that is finite and far too large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spikes, "LEAST_NORMS", 2)
        weights, error = _run("warmup", lambda loader: _Outlier(loader, step), degrees)
    found = weights.changed, weights.num_skipped, weights.reasons, error
    return _gathered(("changed", "skipped", "reasons", "messages"), found)


def misread(stage: str, step: int, **degrees) -> dict:
    """How many steps each rank has counted, and how the run ended."""
    weights, error = _run(stage, lambda loader: _Misread(loader, step), degrees)
    return _gathered(("steps", "messages"), (len(weights.changed), error))


def alone(fault: str) -> dict:
    """What every rank is told of a fault that the first rank alone comes upon.

    Args:
        fault: ``other settings`` of the run that is to be resumed, a ``full disk`` when a stage is complete, or one
            that takes no line of the log (``full log``).
    """
    topology.set_layout(ParallelSettings(), seed=0)
    message = ""
    with rank_folders() as (own, shared), pytest.MonkeyPatch.context() as patch:
        write_folders(own)
        settings = replace(tiny_settings(own, steps=2), output_dir=str(shared / "out"), resume=True)
        if topology.is_first_rank():
            (shared / "out" / "bridge").mkdir(parents=True)
            if fault == "full log":
                (shared / "out" / "bridge" / METRICS_FILE).symlink_to("/dev/full")
            save_settings(replace(settings, seed=7), shared / "out" / SETTINGS_FILE)
        dist.barrier()
        patch.setattr(StageSummary, "save", _full_disk)
        try:
            if fault == "other settings":
                _is_resumed(prepare_context(settings), holds_run=True)
            else:
                run_stage(prepare_context(settings), "bridge", checkpoint=None, stop=StopWatch())
        except ValueError as error:
            message = str(error)
    return _gathered(("messages",), (message,))


def _full_disk(*args) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


LAYOUTS = {"single": (1, degrees()), "dp2": (2, degrees()), "pp2": (2, degrees(pp=2)), "tp2": (2, degrees(tp=2))}
ONCE = {
    f"poisoned-once-{stage}-{name}": (stage, *LAYOUTS[name])
    for stage, names in (("warmup", ("single", "dp2", "pp2")), ("contrastive", ("dp2", "tp2")))
    for name in names
}
OUTLIERS = {f"outlier-{name}": LAYOUTS[name] for name in ("dp2", "pp2")}
ALWAYS = {f"poisoned-always-{name}": ("bridge", *layout) for name, layout in LAYOUTS.items() if name in ("dp2", "pp2")}
MISREAD = {
    "misread-dp2": ("contrastive", 2, degrees()),
    "misread-tp2-dp2": ("warmup", 4, degrees(tp=2)),
    "misread-nobody-dp2": ("contrastive", 2, degrees()),
}

ALONE = {
    "alone-other-settings": ("other settings", "cannot be resumed under other settings: seed was 7, is 1234"),
    "alone-full-disk": ("full disk", "cannot write to .*bridge, free space on its disk and resume the run.*No space"),
    "alone-full-log": ("full log", "log of stage bridge cannot be written to .*bridge .*No space left.*: free space"),
}

CHECKS = {
    **{name: Check(2, functools.partial(alone, fault)) for name, (fault, _) in ALONE.items()},
    **{
        n: Check(size, functools.partial(misread, stage, 0 if "nobody" in n else 3, **deg))
        for n, (stage, size, deg) in MISREAD.items()
    },
    **{n: Check(size, functools.partial(outlier, 3, **deg)) for n, (size, deg) in OUTLIERS.items()},
    **{n: Check(size, functools.partial(poisoned, stage, {3}, **deg)) for n, (stage, size, deg) in ONCE.items()},
    **{
        n: Check(size, functools.partial(poisoned, stage, set(range(2, STEPS + 1)), **deg))
        for n, (stage, size, deg) in ALWAYS.items()
    },
}
