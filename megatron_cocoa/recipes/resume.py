"""Resuming a run that was stopped: what is complete, where to start, and whether it is still the same run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from megatron_cocoa.checkpoint.info import is_complete
from megatron_cocoa.checkpoint.writer import remove_incomplete, restore_replaced
from megatron_cocoa.config import STAGES, TrainSettings
from megatron_cocoa.parallel.collectives import on_first_rank
from megatron_cocoa.parallel.topology import LaunchInfo
from megatron_cocoa.recipes.output_folder import JOB_FILE, STAGE_CHECKPOINT, STEP_CHECKPOINTS
from megatron_cocoa.settings.saved import SETTINGS_FILE, settings_to_dict
from megatron_cocoa.training.stage_checkpoints import BEST, complete_steps, remove_leftovers, step_folders

MAY_CHANGE = (
    "output_dir overwrite resume log_interval wandb_project evaluate with_baseline parallel. checkpoint. validation. "
    "optimizer.max_norm_ratio optimizer.max_skipped_steps "
    "recompute. data.path data.num_workers data.tokens_per_microbatch model.path model.random_weights "
    "model.transformer_impl model.attention_backend model.vision_attention_backend model.make_vocab_size_divisible_by "
    "warmup.micro_batch_size bridge.micro_batch_size contrastive.micro_batch_size"
).split()
"""Settings, or groups of them, that change how a run computes but not what, or what it takes for a fault."""


@dataclass(frozen=True)
class StagePlace:
    """How far one stage of an earlier process has come.

    is_complete: it has handed its weights over.
    step:        of its last complete checkpoint; None where there is none.
    damaged:     checkpoints that have their name and are not complete: copied in part, or damaged later.
    """

    is_complete: bool = False
    step: int | None = None
    damaged: tuple[str, ...] = ()


def after_restart(settings: TrainSettings, launch: LaunchInfo) -> TrainSettings:
    """``settings`` with ``resume``, if this is a restart of the job that began the run in ``output_dir``.

    A restarted job repeats its command: with ``overwrite`` it would remove what its earlier starts have trained, and
    without ``resume`` it would be refused. Every rank calls this, and all get the same answer.
    """
    restarted: list[tuple[str, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(restarted, launch.restarted)

    def is_own() -> bool:
        path = Path(settings.output_dir) / JOB_FILE
        begun_by = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return any(name in begun_by for names in restarted for name in names)

    return replace(settings, overwrite=False, resume=True) if on_first_rank(is_own) else settings


def find_places(output: Path, names: list[str]) -> dict[str, StagePlace]:
    """How far the stage in each folder of ``names`` has come; every rank calls it and gets what the first rank sees.

    Raises:
        ValueError: where the first rank cannot see it.
    """
    failure = f"cannot resume the run in {output}"
    return on_first_rank(lambda: {name: _place(output / name) for name in names}, failure, is_long=True)


def clear_unfinished(output: Path, names: list[str]) -> None:
    """Remove what an interrupted process left half-written in each folder of ``names``; one rank calls it.

    A process that still lives, and that the folder was taken from, completes nothing of it any more.
    """
    for folder in (output / name for name in names):
        remove_leftovers(folder / STEP_CHECKPOINTS)
        for name in (STAGE_CHECKPOINT, BEST):
            remove_incomplete(folder, name)
            restore_replaced(folder / name)


def _place(folder: Path) -> StagePlace:
    steps = complete_steps(folder / STEP_CHECKPOINTS)
    named = [folder / STAGE_CHECKPOINT, *(path for _, path in step_folders(folder / STEP_CHECKPOINTS))]
    damaged = tuple(str(path) for path in named if path.is_dir() and not is_complete(path))
    return StagePlace(is_complete(folder / STAGE_CHECKPOINT), steps[-1] if steps else None, damaged)


def check_same_run(settings: TrainSettings, output: Path) -> None:
    """Refuse to resume a run under settings that would train something else.

    Allowed are: stages added at the end, other settings of stages that have not begun, another layout over ranks and
    packs, and other places of files. Within a stage the optimizer's state stays in the form of its kind of optimizer.

    Raises:
        ValueError: naming each setting that differs, with both values.
    """
    path = output / SETTINGS_FILE
    try:
        before = _flat(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): the run in {output} cannot be resumed") from error
    now = _flat(settings_to_dict(settings))
    # A run of an earlier version did what the defaults of settings that it did not have say.
    before = _flat(settings_to_dict(TrainSettings())) | before
    stages = before.get("stages", [])
    if now["stages"][: len(stages)] != stages:
        raise ValueError(
            f"the run in {output} has stages {stages}, now they are {now['stages']}: stages can only be added at "
            f"the end"
        )
    begun = [stage for stage in STAGES if _has_begun(output / stage)]
    is_within_stage = _is_within_stage(output)
    differing = [key for key in now if _compared(key, before.get(key)) != _compared(key, now[key])]
    changed = [key for key in differing if key != "stages" and not _may_change(key, begun, is_within_stage)]
    if changed:
        listed = "; ".join(f"{key} was {before.get(key, 'absent')}, is {now[key]}" for key in changed)
        raise ValueError(
            f"the run in {output} cannot be resumed under other settings: {listed}. Set them back, or start a new run "
            f"from its weights with --model.load and another --output_dir"
        )


def _has_begun(folder: Path) -> bool:
    return (folder / STAGE_CHECKPOINT).is_dir() or bool(complete_steps(folder / STEP_CHECKPOINTS))


def _is_within_stage(output: Path) -> bool:
    """Whether a stage, or the baseline, is to go on from a checkpoint that holds its optimizer's state."""
    return any(
        complete_steps(steps) and not is_complete(steps.parent / STAGE_CHECKPOINT)
        for steps in output.glob(f"*/{STEP_CHECKPOINTS}")
    )


def _compared(key: str, value: Any) -> Any:
    """A setting without the places of files; the rows themselves are compared when their loader resumes."""
    if key != "data.sources":
        return value
    return [{name: v for name, v in source.items() if name not in ("path", "image_root")} for source in value or ()]


def _may_change(key: str, begun: list[str], is_within_stage: bool) -> bool:
    if key == "parallel.use_distributed_optimizer" and is_within_stage:
        # Megatron's two kinds of optimizer name their state differently, and neither reads the other's.
        return False
    part = key.partition(".")[0]
    if part in STAGES and part not in begun:
        return True
    if key == "model.load" and begun:
        return True
    return any(key == allowed or (allowed.endswith(".") and key.startswith(allowed)) for allowed in MAY_CHANGE)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
