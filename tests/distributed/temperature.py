"""Checks of the learned temperature: one value on all ranks, whatever the layout, that checkpoints keep."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_cocoa.checkpoint.info import CheckpointInfo
from megatron_cocoa.checkpoint.initial import load_initial_weights
from megatron_cocoa.checkpoint.store import save_checkpoint
from megatron_cocoa.config import ParallelSettings
from megatron_cocoa.model.build import Model, build_model
from megatron_cocoa.parallel import topology
from megatron_cocoa.recipes.context import RunContext
from megatron_cocoa.training.data_parallel import wrap_data_parallel
from megatron_cocoa.training.optimizer import build_optimizer
from tests.distributed.check import Check, degrees
from tests.distributed.folders import rank_folders
from tests.distributed.gradients import bare_model, gradients_at
from tests.distributed.uneven import uneven_context

OBJECTIVE, PACKS, STEPS = "contrastive-learned-temperature", 4, 3
OTHER = 0.5
"""Where a model starts that should read its temperature from a checkpoint."""


def trained(parallel_degrees: dict, with_checkpoints: bool) -> dict[str, float]:
    """The temperature after some steps, the spread over ranks, and what checkpoints make of it."""
    parallel = ParallelSettings(**parallel_degrees)
    topology.set_layout(parallel, seed=0)
    context = uneven_context(OBJECTIVE, parallel)
    bare = bare_model(context, "contrastive")
    model = wrap_data_parallel(bare, parallel)
    settings = context.settings
    optimizer, schedule = build_optimizer(model, settings.contrastive, settings.optimizer, parallel)
    for _ in range(STEPS):
        optimizer.zero_grad()
        schedule.step(increment=1)
        gradients_at(model, context, OBJECTIVE, PACKS * topology.data_parallel_size())
        optimizer.step()
    value = temperatures(model)
    found = dict(start=settings.contrastive.temperature, value=value[0], spread=max(value) - min(value))
    if with_checkpoints:
        with rank_folders() as (_, shared):
            found |= _through_checkpoints(context, model, shared)
    return found


def temperatures(model: Model) -> list[float]:
    """Of every rank that holds one."""
    mine = [torch.exp(-c.logit_scale).item() for c in model.bare_chunks if c.logit_scale is not None]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return [value for rank in gathered for value in rank]


def _through_checkpoints(context: RunContext, model: Model, folder: Path) -> dict[str, float]:
    """Saved here, loaded with every rank a pipeline stage; and loaded from a checkpoint that has none."""
    info = CheckpointInfo("contrastive", 1, context.bundle.mask_token_id, context.bundle.bridge_token_id, {})
    save_checkpoint(folder / "with", model.bare_chunks, info)
    parallel = ParallelSettings(pipeline_model_parallel_size=dist.get_world_size())
    topology.set_layout(parallel, seed=0)
    context = replace(context, settings=replace(context.settings, parallel=parallel))
    without = _built(context, folder / "with", temperature=None)
    save_checkpoint(folder / "without", without.bare_chunks, info)
    return dict(
        loaded=max(temperatures(_built(context, folder / "with", temperature=OTHER))),
        kept=max(temperatures(_built(context, folder / "without", temperature=OTHER))),
        left_out=float(not temperatures(without)),
    )


def _built(context: RunContext, checkpoint: Path, *, temperature: float | None) -> Model:
    model = build_model(
        context.architecture, context.settings, with_image_decoder=False, learned_temperature=temperature
    )
    load_initial_weights(model.chunks, context.table, context.weight_source(checkpoint))
    return model


LAYOUTS: dict[str, tuple[int, dict, bool]] = {
    "temperature-single": (1, degrees(), False),
    "temperature-dp2-distributed-optimizer": (2, degrees(use_distributed_optimizer=True), False),
    "temperature-tp2-sp": (2, degrees(tp=2, sequence_parallel=True), True),
    "temperature-pp2": (2, degrees(pp=2), False),
    "temperature-cp2": (2, degrees(cp=2), False),
}
"""World size, degrees, and whether checkpoints are written and read."""

CHECKS = {name: Check(size, functools.partial(trained, *rest)) for name, (size, *rest) in LAYOUTS.items()}
