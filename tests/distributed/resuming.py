"""Checks of resuming: a stage that is stopped and goes on, at the same layout or another, against an unbroken one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear

from megatron_cocoa.checkpoint.info import CheckpointInfo
from megatron_cocoa.checkpoint.store import load_checkpoint, save_checkpoint
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.config import (
    AdapterSettings,
    CheckpointSettings,
    OptimizerSettings,
    ParallelSettings,
    TrainSettings,
)
from megatron_cocoa.parallel import topology
from megatron_cocoa.recipes.context import prepare_context
from megatron_cocoa.recipes.initial_model import build_with_weights
from megatron_cocoa.recipes.stages import run_stage
from megatron_cocoa.training.data_parallel import wrap_data_parallel
from megatron_cocoa.training.log import read_metrics
from megatron_cocoa.training.optimizer import build_optimizer
from megatron_cocoa.training.stage_checkpoints import complete_steps
from megatron_cocoa.training.stopping import StopWatch
from tests.distributed.check import Check, degrees
from tests.distributed.folders import rank_folders
from tests.distributed.tiny_run import tiny_settings, write_folders
from tests.distributed.training import untie

STAGE, STEPS, STOP_AFTER = "bridge", 10, 4
OPTIMIZER = OptimizerSettings(adam_eps=1e-4)
"""With the usual 1e-8 Adam makes full steps of rounding where a gradient is zero in exact arithmetic (key biases)."""

NO_ADAPTER = AdapterSettings()


class _StopAfter(StopWatch):
    """Asks for a stop at the end of the given step of this process."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def reason(self) -> str | None:
        self.left -= 1
        return None if self.left else "the test asked for it"


def resume_at(
    stages: tuple[str, ...],
    first: dict,
    second: dict,
    adapter: AdapterSettings = NO_ADAPTER,
    dtype: str = "fp32",
    tied: bool = True,
    **checkpoint,
) -> dict:
    """Losses and final weights of stages that run through at ``first``, against stopped ones that end at ``second``."""
    found: dict = {}
    with rank_folders() as (own, shared):
        write_folders(own)
        if not tied:
            untie(own)
        for stage in stages:
            whole = [(first, None, None)]
            through = _run(own, shared / f"{stage}-through", stage, whole, adapter, dtype, **checkpoint)
            parts = [(first, None, STOP_AFTER), (second, STOP_AFTER, None)]
            stopped = _run(own, shared / f"{stage}-stopped", stage, parts, adapter, dtype, **checkpoint)
            found[stage] = {
                "losses": [through["losses"], stopped["losses"]],
                "weights_apart": weights_apart(through["weights"], stopped["weights"]),
                "kept": stopped["kept"],
            }
    return found


def _run(
    own: Path, output: Path, stage: str, parts: list[tuple], adapter: AdapterSettings, dtype: str, **checkpoint
) -> dict:
    """One stage in one or several processes' worth of calls; what it leaves behind."""
    kept: list[list[int]] = []
    for layout, resume_step, stop_after in parts:
        settings = tiny_settings(own, steps=STEPS, parallel=ParallelSettings(**layout), adapter=adapter)
        settings = replace(
            settings,
            output_dir=str(output),
            checkpoint=CheckpointSettings(**checkpoint),
            optimizer=OPTIMIZER,
            model=replace(settings.model, dtype=dtype),
            contrastive=replace(settings.contrastive, learnable_temperature=dtype == "bf16"),
        )
        run_part(settings, stage, resume_step=resume_step, stop_after=stop_after)
        kept.append(complete_steps(output / stage / "checkpoints"))
    losses = [line["loss"] for line in read_metrics(output / stage)] if topology.is_first_rank() else []
    return {"losses": losses, "weights": output / stage / "checkpoint", "kept": kept}


def run_part(
    settings: TrainSettings, stage: str, *, resume_step: int | None = None, stop_after: int | None = None
) -> None:
    """One process's worth of a stage: from its start or a checkpoint, to its end or so many steps on."""
    topology.set_layout(settings.parallel, seed=0)
    summary = run_stage(
        prepare_context(settings),
        stage,
        checkpoint=None,
        resume_step=resume_step,
        stop=None if stop_after is None else _StopAfter(stop_after),
    )
    assert (summary.stopped is None) == (stop_after is None), summary
    dist.barrier()


def weights_apart(one: Path, other: Path) -> dict[str, float | str]:
    """Largest difference between two checkpoints' weights, relative to each tensor's largest value; and how many."""
    worst, worst_key, compared = 0.0, "", 0
    with TorchDistReader(one) as left, TorchDistReader(other) as right:
        keys = [key for key in left.keys() if not key.endswith("_extra_state")]
        assert set(keys) == {key for key in right.keys() if not key.endswith("_extra_state")}
        for key in keys:
            a, b = left.read(key), right.read(key)
            # Vocabulary rows are padded to a multiple of the tensor parallel size.
            rows = min(a.shape[0], b.shape[0])
            apart = (a[:rows] - b[:rows]).abs().max() / a.abs().max().clamp_min(1e-3)
            (worst, worst_key), compared = max((worst, worst_key), (float(apart), key)), compared + 1
            assert torch.isfinite(apart)
    return {"worst": worst, "worst_key": worst_key, "compared": compared}


def extra_state(first: dict, second: dict) -> dict:
    """What each layer's fused projection kept beside its weights at ``first`` and finds at ``second``, layer by layer.

    A stand-in for the scales of delayed FP8, which Transformer Engine keeps there as a byte tensor.
    """
    found: dict = {"resumed": [], "started": []}
    with rank_folders() as (own, shared), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ColumnParallelLinear, "get_extra_state", lambda linear: getattr(linear, "scales", None))
        patch.setattr(ColumnParallelLinear, "set_extra_state", lambda linear, state: setattr(linear, "scales", state))
        write_folders(own)
        model, optimizer = _built(own, first)
        for number, linear in _fused_projections(model):
            linear.scales = torch.full((3,), number, dtype=torch.uint8)
        save_checkpoint(shared / "saved", model.bare_chunks, CheckpointInfo(STAGE, 1, 0, 0, {}), optimizer=optimizer)
        for name in found:
            model, optimizer = _built(own, second)
            load_checkpoint(shared / "saved", model.bare_chunks, optimizer=optimizer if name == "resumed" else None)
            kept = [(n, getattr(linear, "scales", None)) for n, linear in _fused_projections(model)]
            everyone: list = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, [(n, None if scales is None else scales.tolist()) for n, scales in kept])
            found[name] = [scales for _, scales in sorted(sum(everyone, []))]
    return found


def _built(own: Path, degrees: dict):
    """A model of local layers in training and its optimizer, after a step of no length."""
    parallel = ParallelSettings(**degrees)
    topology.set_layout(parallel, seed=0)
    settings = tiny_settings(own, steps=STEPS, parallel=parallel)
    settings = replace(settings, model=replace(settings.model, transformer_impl="local"))
    bare = build_with_weights(prepare_context(settings), checkpoint=None, with_image_decoder=False)
    model = wrap_data_parallel(bare, parallel)
    optimizer, _ = build_optimizer(model, settings.stage(STAGE), OPTIMIZER, parallel)
    optimizer.step()
    return model, optimizer


def _fused_projections(model) -> Iterator[tuple[int, torch.nn.Module]]:
    """Of this rank's language layers, each with its layer's number."""
    for chunk in model.bare_chunks:
        for layer in chunk.language_model.decoder.layers:
            yield layer.layer_number, layer.self_attention.linear_qkv


ALL = ("warmup", "bridge", "contrastive")
_SHARDED = dict(use_distributed_optimizer=True)

SAME: dict[str, tuple[int, tuple[str, ...], dict, dict]] = {
    "resume-single": (1, ALL, degrees(), dict(save_interval=2)),
    "resume-single-background": (1, ("bridge",), degrees(), dict(save_interval=1, asynchronous=True)),
    "resume-dp2-overlap": (
        2, ("contrastive",),
        degrees(overlap_grad_reduce=True, overlap_param_gather=True, **_SHARDED), dict(save_interval=3),
    ),
    "resume-tp2-background": (2, ("warmup",), degrees(tp=2), dict(save_interval=2, asynchronous=True)),
    # DoRA's magnitudes and the temperature are FP32 parameters among BF16 ones.
    "resume-tp2-bf16": (
        2, ("contrastive",), degrees(tp=2),
        dict(save_interval=2, adapter=AdapterSettings(kind="dora", dropout=0.1), dtype="bf16"),
    ),
    # The temperature on the last stage is without weight decay, and the only such parameter.
    "resume-pp2-bf16-lora": (
        2, ("contrastive",), degrees(pp=2),
        dict(save_interval=2, adapter=AdapterSettings(kind="lora", dropout=0.1), dtype="bf16"),
    ),
    "resume-pp2-bf16-nothing-trains-on-the-last-stage": (
        2, ("bridge",), degrees(pp=2),
        dict(save_interval=2, adapter=AdapterSettings(kind="lora", language_targets=()), dtype="bf16", tied=False),
    ),
    "resume-tp2-sp-adapters": (
        2, ("bridge",), degrees(tp=2, sequence_parallel=True),
        dict(save_interval=2, adapter=AdapterSettings(kind="dora", dropout=0.1)),
    ),
}

WITHOUT_DROPOUT = AdapterSettings(kind="dora", dropout=0.0)
"""Masks follow from the place of a rank, so that only a run without them goes on at another layout as it would have."""

MOVED: dict[str, tuple] = {
    "resume-dp2-to-tp2": (2, ("contrastive",), degrees(**_SHARDED), degrees(tp=2, **_SHARDED)),
    "resume-tp2-to-pp2": (2, ("warmup",), degrees(tp=2, **_SHARDED), degrees(pp=2, **_SHARDED)),
    "resume-pp2-vpp2-to-dp2": (2, ("bridge",), degrees(pp=2, vpp=2, **_SHARDED), degrees(**_SHARDED)),
    "resume-adapters-tp2-to-pp2": (
        2, ("warmup",), degrees(tp=2, **_SHARDED), degrees(pp=2, **_SHARDED), WITHOUT_DROPOUT,
    ),
    "resume-tp2-pp2-to-dp2-cp2": (
        4, ("warmup",), degrees(tp=2, pp=2, **_SHARDED), degrees(cp=2, **_SHARDED),
    ),
}  # fmt: skip

EXTRA_STATE: dict[str, tuple[int, dict, dict]] = {
    "extra-state-single": (1, degrees(), degrees()),
    "extra-state-tp2-to-pp2": (2, degrees(tp=2), degrees(pp=2)),
}

CHECKS = {
    **{name: Check(size, functools.partial(extra_state, *how)) for name, (size, *how) in EXTRA_STATE.items()},
    **{
        name: Check(size, functools.partial(resume_at, stages, degrees, degrees, **checkpoint))
        for name, (size, stages, degrees, checkpoint) in SAME.items()
    },
    **{
        name: Check(size, functools.partial(resume_at, *how)) for name, (size, *how) in MOVED.items()
    },
}
