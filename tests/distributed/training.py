"""Checks of training: losses of the three stages at a layout, and checkpoints that move between layouts."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cocoa.checkpoint.info import CheckpointInfo
from megatron_cocoa.checkpoint.store import load_checkpoint, save_checkpoint
from megatron_cocoa.config import STAGES, ParallelSettings
from megatron_cocoa.model.build import Model, build_model
from megatron_cocoa.objectives import build_objective
from megatron_cocoa.parallel import topology
from megatron_cocoa.recipes.context import RunContext, prepare_context
from megatron_cocoa.recipes.initial_model import build_with_weights
from megatron_cocoa.recipes.retrieval import RetrievalProbe
from megatron_cocoa.recipes.stage_loader import build_loader
from megatron_cocoa.training.data_parallel import wrap_data_parallel
from megatron_cocoa.training.trainer import train_stage
from tests.distributed.check import Check, degrees
from tests.distributed.folders import rank_folders
from tests.distributed.tiny_run import tiny_settings, write_folders

STEPS = 20


class _Losses:
    """Keeps loss and gradient norm of every step, where a run would write them."""

    def __init__(self):
        self.values: list[float] = []
        self.grad_norms: list[float] = []

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.values.append(metrics["loss"])
        self.grad_norms.append(metrics["grad_norm"])


def stage_losses(*, tokens_per_microbatch: int | None = None, **parallel) -> dict[str, list[float]]:
    """The first losses and gradient norms of each stage at a layout, each stage from the same random weights."""
    settings = ParallelSettings(**parallel)
    topology.set_layout(settings, seed=0)
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        write_folders(Path(folder))
        run = tiny_settings(Path(folder), steps=STEPS, parallel=settings)
        run = replace(run, data=replace(run.data, tokens_per_microbatch=tokens_per_microbatch))
        context = prepare_context(run)
        for stage in STAGES:
            model, log = _train(context, stage)
            losses[stage] = log.values
            losses[f"{stage}_grad_norm"] = log.grad_norms
            losses[f"{stage}_weights_apart"] = _apart_over_replicas(model)
        dist.barrier()
    return losses


def _train(context: RunContext, stage: str) -> tuple[Model, _Losses]:
    """All steps of a stage from the random weights of the context's seed."""
    settings = context.settings
    model = build_with_weights(context, checkpoint=None, with_image_decoder=stage == "warmup")
    model, log = wrap_data_parallel(model, settings.parallel), _Losses()
    objective, loader = build_objective(stage, settings), build_loader(context, stage)
    train_stage(model, objective, loader, stage=settings.stage(stage), settings=settings, log=log)
    return model, log


def unread_token_head(tied: bool, degrees: dict) -> dict[str, list[float]]:
    """Losses of stage ``contrastive``, which reads no logits, without overlaps and with all of them."""
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        write_folders(Path(folder))
        if not tied:
            untie(Path(folder))
        for name, overlaps in (("plain", {}), ("overlapped", OVERLAP)):
            settings = ParallelSettings(**degrees, **overlaps)
            topology.set_layout(settings, seed=0)
            context = prepare_context(tiny_settings(Path(folder), steps=4, parallel=settings))
            assert context.architecture.tie_word_embeddings == tied
            _, log = _train(context, "contrastive")
            losses[name] = log.values
        dist.barrier()
    return losses


def untie(folder: Path) -> None:
    """Give the model of ``write_folders`` an output layer of its own."""
    config = folder / "model" / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))


def _apart_over_replicas(model) -> float:
    """Largest difference of a weight between data-parallel ranks, as a checkpoint would find them."""
    group, apart = parallel_state.get_data_parallel_group(), 0.0
    for chunk in model.bare_chunks:
        for parameter in chunk.parameters():
            low, high = parameter.detach().clone(), parameter.detach().clone()
            dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
            dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
            apart = max(apart, float((high - low).abs().max()))
    return apart


def checkpoint_moves(save_at: dict, load_at: dict) -> dict[str, float]:
    """Largest difference of embeddings between the layout that saved and the one that loaded."""
    with rank_folders() as (folder, shared):
        write_folders(folder)
        path = shared / "checkpoint"
        embeddings = []
        for index, degrees in enumerate((save_at, load_at)):
            parallel = ParallelSettings(**degrees)
            topology.set_layout(parallel, seed=index)
            context = prepare_context(tiny_settings(folder, parallel=parallel, seed=100 + index))
            if index == 0:
                model = build_with_weights(context, checkpoint=None, with_image_decoder=True)
                info = CheckpointInfo("warmup", 1, context.bundle.mask_token_id, context.bundle.bridge_token_id, {})
                save_checkpoint(path, model.chunks, info)
            else:
                model = build_model(context.architecture, context.settings, with_image_decoder=False)
                load_checkpoint(path, model.chunks)
            probe = RetrievalProbe(context, context.settings.contrastive, batch_size=5)
            found = probe.embed(model, probe.pools[0])
            embeddings.append(torch.cat([found.texts, found.pictures]))
    return {"difference": float((embeddings[0] - embeddings[1]).abs().max())}


OVERLAP = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
LAYOUTS: dict[str, tuple[int, dict]] = {
    "train-single": (1, degrees()),
    "train-dp2": (2, degrees()),
    "train-dp2-distributed-optimizer": (2, degrees(use_distributed_optimizer=True)),
    "train-dp2-overlap": (2, degrees(**OVERLAP)),
    "train-tp2": (2, degrees(tp=2)),
    "train-tp2-sp": (2, degrees(tp=2, sequence_parallel=True)),
    "train-pp2": (2, degrees(pp=2)),
    "train-pp2-vpp2": (2, degrees(pp=2, vpp=2)),
    "train-cp2": (2, degrees(cp=2)),
    "train-tp2-pp2": (4, degrees(tp=2, pp=2)),
    "train-pp2-dp2": (4, degrees(pp=2)),
    "train-pp2-vpp2-filled": (2, dict(tokens_per_microbatch=128, **degrees(pp=2, vpp=2))),
    "train-tp2-pp2-sp-filled": (4, dict(tokens_per_microbatch=128, **degrees(tp=2, pp=2, sequence_parallel=True))),
}

UNREAD_HEADS: dict[str, tuple[int, bool, dict]] = {
    "unread-head-untied-dp2": (2, False, degrees()),
    "unread-head-tied-pp2": (2, True, degrees(pp=2)),
}

MOVES: dict[str, tuple[int, dict, dict]] = {
    "checkpoint-tp2-to-pp2": (2, degrees(tp=2), degrees(pp=2)),
    "checkpoint-pp2-to-dp2": (2, degrees(pp=2), degrees()),
    "checkpoint-tp2-pp2-to-pp4": (4, degrees(tp=2, pp=2), degrees(pp=4)),
}

CHECKS = {
    **{name: Check(size, functools.partial(stage_losses, **degrees)) for name, (size, degrees) in LAYOUTS.items()},
    **{name: Check(size, functools.partial(unread_token_head, *how)) for name, (size, *how) in UNREAD_HEADS.items()},
    **{name: Check(size, functools.partial(checkpoint_moves, *ends)) for name, (size, *ends) in MOVES.items()},
}
