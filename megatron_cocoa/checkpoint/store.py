"""Distributed checkpoints: written whole or not at all, loaded at any layout.

A checkpoint is a folder that ``megatron.core.dist_checkpointing`` reads (``torch_dist``), plus ``cocoa.json``, which
says what it holds. It is written beside its place and renamed when every rank is done: a folder that carries the
final name is complete, and one that does not is ignored and replaced.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

INFO_FILE = "cocoa.json"
IMPORT_STAGE = "import"
"""``CheckpointInfo.stage`` of converted weights, which no stage has trained."""

OPTIMIZER_SHARDING = "fully_reshardable"
"""Megatron's form of optimizer state that loads at any data-parallel size."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds, beside its tensors.

    stage:          the stage that wrote it, or ``import`` for converted weights.
    step:           optimizer steps of that stage.
    mask_token_id, bridge_token_id: rows of the embedding that the model was trained with.
    loader:         the data loader's place.
    has_optimizer:  whether optimizer state is there.
    hf_config:      the Hugging Face ``config.json`` of the architecture.
    """

    stage: str
    step: int
    mask_token_id: int
    bridge_token_id: int
    hf_config: dict[str, Any]
    loader: dict[str, Any] = field(default_factory=dict)
    has_optimizer: bool = False


def save_checkpoint(path: str | Path, chunks: Sequence[nn.Module], info: CheckpointInfo, *, optimizer=None) -> None:
    """Write a checkpoint; every rank calls it.

    Args:
        path: its folder; one that is there already is replaced when the new one is complete.
        chunks: this rank's bare model chunks.
        info: what it holds.
        optimizer: Megatron's optimizer, to resume from; None saves weights alone.

    Raises:
        ValueError: if the folder cannot be written (the cause is named, and the incomplete folder removed).
    """
    final = Path(path)
    work = final.with_name(final.name + ".incomplete")
    _on_first_rank(lambda: (_restore(final), _make_empty(work)), f"cannot write a checkpoint under {final.parent}")
    state = sharded_state(chunks, optimizer)
    _save_on_all_ranks(state, work, final)
    _on_first_rank(lambda: _finish(work, final, info), f"cannot complete the checkpoint {final}")


def load_checkpoint(
    path: str | Path, chunks: Sequence[nn.Module], *, optimizer=None, may_be_missing: tuple[str, ...] = ()
) -> CheckpointInfo:
    """Load weights (and optimizer state) into the chunks at their layout; every rank calls it.

    Args:
        path: a complete checkpoint.
        chunks: this rank's bare model chunks; what the checkpoint holds beyond them is left out.
        optimizer: loads its state too.
        may_be_missing: prefixes of parameters that keep their values where the checkpoint lacks them.

    Raises:
        ValueError: if the folder is no complete checkpoint, or lacks a parameter that may not be missing.
    """
    info = read_info(path)
    if optimizer is not None and not info.has_optimizer:
        raise ValueError(f"{path} holds weights alone: it can start a stage, but a run cannot resume from it")
    state = sharded_state(chunks, optimizer, is_loading=True)
    present = set(dist_checkpointing.load_tensors_metadata(str(path)))
    absent = _drop_absent(state, present)
    refused = sorted(name for name in absent if not name.startswith(may_be_missing or ("\0",)))
    if refused:
        raise ValueError(f"{path} lacks {len(refused)} parameters of the model: {', '.join(refused[:20])}")
    loaded = dist_checkpointing.load(state, str(path))
    for index, chunk in enumerate(chunks):
        # Not strict: modules of Transformer Engine expect an extra state that the checkpoint may not have.
        missing, unexpected = chunk.load_state_dict(loaded[f"model{index}"], strict=False)
        wrong = [name for name in missing if not name.endswith("_extra_state") and name not in absent] + unexpected
        if wrong:
            raise ValueError(f"{path} does not fit the model, {len(wrong)} parameters: {', '.join(wrong[:20])}")
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    return info


def read_info(path: str | Path) -> CheckpointInfo:
    """What a checkpoint holds.

    Raises:
        ValueError: if the folder is no complete checkpoint of this project.
    """
    folder = Path(path)
    if not (folder / INFO_FILE).is_file() or not (folder / "metadata.json").is_file():
        state = "is incomplete or no checkpoint of megatron_cocoa" if folder.is_dir() else "does not exist"
        raise ValueError(f"{folder} {state}: needed a folder with metadata.json and {INFO_FILE}")
    return CheckpointInfo(**json.loads((folder / INFO_FILE).read_text(encoding="utf-8")))


def sharded_state(chunks: Sequence[nn.Module], optimizer=None, *, is_loading: bool = False) -> ShardedStateDict:
    """What Megatron saves or loads for these chunks."""
    state: ShardedStateDict = {
        f"model{index}": chunk.sharded_state_dict(metadata=_metadata()) for index, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        model_state = {key: value for part in list(state.values()) for key, value in part.items()}
        if len(chunks) > 1:
            model_state = dict(state)
        state["optimizer"] = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=_metadata())
    return state


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": OPTIMIZER_SHARDING,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _content_metadata() -> dict[str, Any]:
    return {"distrib_optim_sharding_type": OPTIMIZER_SHARDING}


def _drop_absent(state: ShardedStateDict, present: set[str]) -> set[str]:
    """Remove the model entries whose tensors the checkpoint lacks, on all ranks' behalf, and name them."""
    absent = set()
    for part, entries in state.items():
        if not part.startswith("model"):
            continue
        for name in [n for n, value in entries.items() if hasattr(value, "key") and value.key not in present]:
            if not name.endswith("_extra_state"):
                absent.add(name)
            del entries[name]
    return absent


def _save_on_all_ranks(state: ShardedStateDict, work: Path, final: Path) -> None:
    """Megatron's save; if it fails on any rank, all ranks raise and the incomplete folder goes.

    Raises:
        ValueError: with the first rank's reason to fail.
    """
    reason: str | None = None
    try:
        dist_checkpointing.save(state, str(work), content_metadata=_content_metadata())
    except (OSError, RuntimeError, CheckpointException) as error:
        # torch's CheckpointException is no Exception, and carries each rank's cause.
        reason = f"{type(error).__name__}: {error}"
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    first = next((r for r in reasons if r is not None), None)
    if first is not None:
        if dist.get_rank() == 0:
            shutil.rmtree(work, ignore_errors=True)
        raise ValueError(
            f"the checkpoint {final} could not be written, nothing was kept of it; free space on its disk, or name "
            f"another output_dir. Cause: {first.strip().splitlines()[-1]}"
        )


def _on_first_rank(action, failure: str) -> None:
    """Run ``action`` on rank 0 while the others wait; all ranks raise if it fails.

    Raises:
        ValueError: ``failure`` and the operating system's reason.
    """
    outcome: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            outcome = [f"{failure}: {error}"]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise ValueError(outcome[0])


def _restore(final: Path) -> None:
    """Give a checkpoint its name back if a run was ended just between the two renames that replace it."""
    previous = final.with_name(final.name + ".replaced")
    if previous.exists() and not final.exists():
        previous.rename(final)


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _finish(work: Path, final: Path, info: CheckpointInfo) -> None:
    (work / INFO_FILE).write_text(json.dumps(asdict(info), indent=1), encoding="utf-8")
    if final.exists():
        previous = final.with_name(final.name + ".replaced")
        shutil.rmtree(previous, ignore_errors=True)
        final.rename(previous)
        work.rename(final)
        shutil.rmtree(previous)
    else:
        work.rename(final)
