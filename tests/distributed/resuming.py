"""Checks of resuming: a stage that is stopped and goes on, at the same layout or another, against an unbroken one."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.config import AdapterSettings, CheckpointSettings, OptimizerSettings, ParallelSettings
from megatron_cocoa.parallel import topology
from megatron_cocoa.recipes.context import prepare_context
from megatron_cocoa.recipes.stages import run_stage
from megatron_cocoa.training.log import read_metrics
from megatron_cocoa.training.stage_checkpoints import complete_steps
from tests.distributed.check import Check
from tests.distributed.folders import rank_folders
from tests.distributed.tiny_run import tiny_settings, write_folders
from tests.distributed.training import _degrees

STEPS, STOP_AFTER = 10, 4
OPTIMIZER = OptimizerSettings(adam_eps=1e-4)
"""With the usual 1e-8 Adam makes full steps of rounding where a gradient is zero in exact arithmetic (key biases)."""

NO_ADAPTER = AdapterSettings()


class _StopAfter:
    """Asks for a stop at the end of the given step of this process."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def reason(self) -> str | None:
        self.left -= 1
        return None if self.left else "the test asked for it"


def resume_at(
    stages: tuple[str, ...], first: dict, second: dict, adapter: AdapterSettings = NO_ADAPTER, **checkpoint
) -> dict:
    """Losses and final weights of stages that run through at ``first``, against stopped ones that end at ``second``."""
    found: dict = {}
    with rank_folders() as (own, shared):
        write_folders(own)
        for stage in stages:
            whole = [(first, None, None)]
            through = _run(own, shared / f"{stage}-through", stage, whole, adapter, **checkpoint)
            parts = [(first, None, STOP_AFTER), (second, STOP_AFTER, None)]
            stopped = _run(own, shared / f"{stage}-stopped", stage, parts, adapter, **checkpoint)
            found[stage] = {
                "losses": [through["losses"], stopped["losses"]],
                "weights_apart": _weights_apart(through["weights"], stopped["weights"]),
                "kept": stopped["kept"],
            }
    return found


def _run(own: Path, output: Path, stage: str, parts: list[tuple], adapter: AdapterSettings, **checkpoint) -> dict:
    """One stage in one or several processes' worth of calls; what it leaves behind."""
    kept: list[list[int]] = []
    for degrees, resume_step, stop_after in parts:
        parallel = ParallelSettings(**degrees)
        topology.set_layout(parallel, seed=0)
        settings = tiny_settings(own, steps=STEPS, parallel=parallel, adapter=adapter)
        settings = replace(
            settings, output_dir=str(output), checkpoint=CheckpointSettings(**checkpoint), optimizer=OPTIMIZER
        )
        summary = run_stage(
            prepare_context(settings),
            stage,
            checkpoint=None,
            resume_step=resume_step,
            stop=None if stop_after is None else _StopAfter(stop_after),
        )
        assert (summary.stopped is None) == (stop_after is None), summary
        dist.barrier()
        kept.append(complete_steps(output / stage / "checkpoints"))
    losses = [line["loss"] for line in read_metrics(output / stage)] if topology.is_first_rank() else []
    return {"losses": losses, "weights": output / stage / "checkpoint", "kept": kept}


def _weights_apart(one: Path, other: Path) -> dict[str, float]:
    """Largest difference between two checkpoints' weights, relative to each tensor's largest value; and how many."""
    worst, compared = 0.0, 0
    with TorchDistReader(one) as left, TorchDistReader(other) as right:
        keys = [key for key in left.keys() if not key.endswith("_extra_state")]
        assert set(keys) == {key for key in right.keys() if not key.endswith("_extra_state")}
        for key in keys:
            a, b = left.read(key), right.read(key)
            # Vocabulary rows are padded to a multiple of the tensor parallel size.
            rows = min(a.shape[0], b.shape[0])
            apart = (a[:rows] - b[:rows]).abs().max() / a.abs().max().clamp_min(1e-3)
            worst, compared = max(worst, float(apart)), compared + 1
            assert torch.isfinite(apart)
    return {"worst": worst, "compared": compared}


ALL = ("warmup", "bridge", "contrastive")
_SHARDED = dict(use_distributed_optimizer=True)

SAME: dict[str, tuple[int, tuple[str, ...], dict, dict]] = {
    "resume-single": (1, ALL, _degrees(), dict(save_interval=2)),
    "resume-single-background": (1, ("bridge",), _degrees(), dict(save_interval=1, asynchronous=True)),
    "resume-dp2-overlap": (
        2, ("contrastive",),
        _degrees(overlap_grad_reduce=True, overlap_param_gather=True, **_SHARDED), dict(save_interval=3),
    ),
    "resume-tp2-background": (2, ("warmup",), _degrees(tp=2), dict(save_interval=2, asynchronous=True)),
    "resume-tp2-sp-adapters": (
        2, ("bridge",), _degrees(tp=2, sequence_parallel=True),
        dict(save_interval=2, adapter=AdapterSettings(kind="dora", dropout=0.1)),
    ),
}

WITHOUT_DROPOUT = AdapterSettings(kind="dora", dropout=0.0)
"""Masks follow from the place of a rank, so that only a run without them goes on at another layout as it would have."""

MOVED: dict[str, tuple] = {
    "resume-dp2-to-tp2": (2, ("contrastive",), _degrees(**_SHARDED), _degrees(tp=2, **_SHARDED)),
    "resume-tp2-to-pp2": (2, ("warmup",), _degrees(tp=2, **_SHARDED), _degrees(pp=2, **_SHARDED)),
    "resume-pp2-vpp2-to-dp2": (2, ("bridge",), _degrees(pp=2, vpp=2, **_SHARDED), _degrees(**_SHARDED)),
    "resume-adapters-tp2-to-pp2": (
        2, ("warmup",), _degrees(tp=2, **_SHARDED), _degrees(pp=2, **_SHARDED), WITHOUT_DROPOUT,
    ),
    "resume-tp2-pp2-to-dp2-cp2": (
        4, ("warmup",), _degrees(tp=2, pp=2, **_SHARDED), _degrees(cp=2, **_SHARDED),
    ),
}  # fmt: skip

CHECKS = {
    **{
        name: Check(size, functools.partial(resume_at, stages, degrees, degrees, **checkpoint))
        for name, (size, stages, degrees, checkpoint) in SAME.items()
    },
    **{
        name: Check(size, functools.partial(resume_at, *how)) for name, (size, *how) in MOVED.items()
    },
}
