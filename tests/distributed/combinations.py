"""Checks of random combinations: a stage stopped at one layout and resumed at another, against one plain process.

Settings and layouts that are right one by one can be wrong together, and there are too many pairs to list. So each
combination is drawn from its number. Its reference is the same stage in the plainest way there is: one process, one
pack a step (which takes gradient caching's direct path), nothing recomputed, no data workers, never stopped.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_cocoa.checkpoint.adapter_mapping import adapter_mappings
from megatron_cocoa.model.build import Model
from megatron_cocoa.objectives import build_objective
from megatron_cocoa.parallel import topology
from megatron_cocoa.recipes.adapters import add_adapters
from megatron_cocoa.recipes.context import RunContext, prepare_context
from megatron_cocoa.recipes.stage_loader import build_loader
from megatron_cocoa.training.data_parallel import wrap_data_parallel
from megatron_cocoa.training.log import read_metrics
from megatron_cocoa.training.step import forward_backward
from tests.distributed.check import Check, degrees, shared_folder
from tests.distributed.drawing import Combination, Layout, drawn
from tests.distributed.gradients import bare_model, worst_gradient
from tests.distributed.resuming import run_part, weights_apart
from tests.distributed.tiny_run import write_folders
from tests.distributed.training import untie
from tests.parity.compare import gather_gradient_shards, parameters

BATCH = 25
"""Combinations whose ranks are started together: more cost fewer starts, fewer show what failed sooner."""


def alone(name: str, combination: Combination) -> dict:
    """The reference: its losses and gradient norms. First gradients and last weights stay in files."""
    folder, own = _data(combination.tied), shared_folder() / name
    own.mkdir()
    context = prepare_context(combination.settings(folder, own / "alone", None))
    model, loss = _first_step(context, combination.stage)
    torch.save((loss, {name: p.main_grad for name, p in parameters(model) if p.requires_grad}), own / "first_step.pt")
    run_part(context.settings, combination.stage)
    return _curves(own / "alone" / combination.stage)


def _data(tied: bool) -> Path:
    """Model and pairs, some of them with hard negatives, written once for all combinations."""
    folder = shared_folder() / ("tied" if tied else "untied")
    if not folder.exists():
        write_folders(folder)
        if not tied:
            untie(folder)
        pairs = folder / "pairs" / "contrastive.jsonl"
        rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
        texts = [row["pos_text"] for row in rows]
        lines = [json.dumps(row | {"neg_text": texts[i + 1 : i + 1 + i % 4]}) for i, row in enumerate(rows)]
        pairs.write_text("\n".join(lines), encoding="utf-8")
    return folder


def _first_step(context: RunContext, stage: str) -> tuple[Model, float]:
    """The model with whole gradients of the stage's first step in its buffers, and the loss."""
    topology.set_layout(context.settings.parallel, seed=0)
    bare = bare_model(context, stage)
    add_adapters(context, bare, stage)
    model, loader = wrap_data_parallel(bare, context.settings.parallel), build_loader(context, stage)
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    loss = forward_backward(model, build_objective(stage, context.settings), loader.next_step())["loss"]
    loader.close()
    gather_gradient_shards(model)
    return model, loss


def _curves(folder: Path) -> dict[str, list[float]]:
    lines = read_metrics(folder)
    return {name: [line[name] for line in lines] for name in ("loss", "grad_norm")}


def at_layout(name: str, combination: Combination, *, resumes: bool) -> dict:
    """One part of the run: errors of the first step at its layout, and what the run has come to."""
    own, stage = shared_folder() / name, combination.stage
    layout = combination.second if resumes else combination.first
    context = prepare_context(combination.settings(_data(combination.tied), own / "moved", layout))
    model, loss = _first_step(context, stage)
    wanted_loss, wanted = torch.load(own / "first_step.pt")
    adapters = adapter_mappings(context.table, context.settings.adapter) if combination.adapter else ()
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, worst_gradient(model, context.table, wanted, adapters))
    gradient, where = max(every)
    found = dict(gradient=gradient, where=where, first_loss=abs(loss - wanted_loss) / abs(wanted_loss))
    stop = combination.stop_after
    run_part(context.settings, stage, **(dict(resume_step=stop) if resumes else dict(stop_after=stop)))
    found |= _curves(own / "moved" / stage)
    if resumes:
        checkpoints = (own / output / stage / "checkpoint" for output in ("alone", "moved"))
        found |= weights_apart(*checkpoints) if topology.is_first_rank() else {}
        dist.barrier()
        if topology.is_first_rank():
            shutil.rmtree(own)
    return found


SMALL = Combination(
    objective="contrastive-hard-negatives",
    first=Layout(2, degrees(tp=2, sequence_parallel=True)),
    second=Layout(2, degrees(pp=2)),
    stop_after=2,
    tied=False,
    packed=dict(micro_batch_size=4),
    data=dict(num_workers=1),
    adapter=dict(kind="dora", dropout=0.0),
    recompute=dict(language="full", vision="mlp"),
)
"""Runs by default, so that this file is known to work."""

FIRST, NUMBER = map(int, os.environ.get("COMBINATIONS", "0 0").split())
DRAWN = {f"combination-{number}": drawn(number) for number in range(FIRST, FIRST + NUMBER)}
COMBINATIONS = {"combination": SMALL} | {name: combination for name, (combination, _) in DRAWN.items()}


def parts_of(name: str) -> tuple[str, str, str]:
    """The checks of a combination, in their order."""
    return f"{name}-alone", f"{name}-stopped", name


def _checks(name: str, combination: Combination, turn: int) -> dict[str, Check]:
    reference, stopped, resumed = parts_of(name)
    first, second = combination.first.world_size, combination.second.world_size
    run = functools.partial(at_layout, name, combination)
    return {
        reference: Check(1, functools.partial(alone, name, combination), turn=turn),
        stopped: Check(first, functools.partial(run, resumes=False), after=(reference,), turn=turn),
        # Worlds of a turn are started in the order of their size.
        resumed: Check(
            second, functools.partial(run, resumes=True), after=(reference, stopped), turn=turn + (second < first)
        ),
    }


CHECKS = {
    check: run
    for place, (name, combination) in enumerate(COMBINATIONS.items())
    for check, run in _checks(name, combination, turn=2 * (place // BATCH)).items()
}
