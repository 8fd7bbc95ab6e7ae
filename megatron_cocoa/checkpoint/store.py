"""Distributed checkpoints: written whole or not at all, loaded at any layout.

A checkpoint is a folder that ``megatron.core.dist_checkpointing`` reads (``torch_dist``), plus ``cocoa.json``, which
says what it holds. It is written beside its place and renamed when every rank is done: a folder that carries the
final name is complete, and one that does not is ignored and replaced.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from megatron_cocoa.checkpoint.info import OPTIMIZER_SHARDING, CheckpointInfo, read_info
from megatron_cocoa.checkpoint.optimizer_state import load_optimizer_state, optimizer_sharded_state
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.checkpoint.writer import CheckpointWriter

PICKLED_STATE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
"""Transformer Engine's variable, without which it refuses the scales that delayed FP8 has pickled."""


def save_checkpoint(
    path: str | Path,
    chunks: Sequence[nn.Module],
    info: CheckpointInfo,
    *,
    optimizer=None,
    writer: CheckpointWriter | None = None,
) -> None:
    """Write a checkpoint; every rank calls it.

    Args:
        path: its folder; one that is there already is replaced when the new one is complete.
        chunks: this rank's bare model chunks.
        info: what it holds; ``has_optimizer`` follows ``optimizer``.
        optimizer: Megatron's optimizer, to resume from; None saves weights alone.
        writer: writes it, perhaps in the background; by default it is complete when the call returns.

    Raises:
        ValueError: if the folder cannot be written (the cause is named, and the incomplete folder removed).
    """
    contents = asdict(replace(info, has_optimizer=optimizer is not None))
    (writer or CheckpointWriter()).write(
        Path(path),
        sharded_state(chunks, optimizer),
        content_metadata={"distrib_optim_sharding_type": OPTIMIZER_SHARDING},
        info=contents,
    )


def load_checkpoint(
    path: str | Path,
    chunks: Sequence[nn.Module],
    *,
    optimizer=None,
    may_be_missing: tuple[str, ...] = (),
    left_out: frozenset[str] = frozenset(),
) -> CheckpointInfo:
    """Load weights (and optimizer state) into the chunks at their layout; every rank calls it.

    Args:
        path: a complete checkpoint.
        chunks: this rank's bare model chunks; what the checkpoint holds beyond them is left out.
        optimizer: loads its state too, and the modules' extra state (scales and history of delayed FP8). Both are
            pickled, so that a run takes them from its own checkpoints alone; weights that a run starts from are not.
        may_be_missing: prefixes of parameters that keep their values where the checkpoint lacks them.
        left_out: names of parameters that keep their values whatever it has.

    Raises:
        ValueError: if the folder is no complete checkpoint or is damaged, lacks a parameter that may not be missing,
            has one of another shape, or holds adapters that are not merged and that the model does not have.
    """
    info = read_info(path)
    with TorchDistReader(path):
        # It has seen by now that every file is there and as long as it should be.
        pass
    if optimizer is not None and not info.has_optimizer:
        raise ValueError(f"{path} holds weights alone: it can start a stage, but a run cannot resume from it")
    state = sharded_state(chunks, optimizer, is_loading=True)
    for part, entries in state.items():
        for name in left_out & entries.keys() if part.startswith("model") else ():
            del entries[name]
    # Each part of a pickled object is stored by itself; a tensor's parts have one key.
    read_stored = dist_checkpointing.load_tensors_metadata if optimizer is None else load_sharded_metadata
    stored = read_stored(str(path))
    _check_shapes(path, state, stored)
    present = set(stored)
    _refuse_unmerged(path, state, present)
    absent = _drop_absent(state, present)
    refused = sorted(name for name in absent if not name.startswith(may_be_missing or ("\0",)))
    if refused:
        raise ValueError(f"{path} lacks {len(refused)} parameters of the model: {', '.join(refused[:20])}")
    try:
        loaded = dist_checkpointing.load(state, str(path))
    except (CheckpointException, CheckpointingException, EOFError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{path} cannot be loaded, it may be damaged ({reason[-1] if reason else type(error).__name__}): go on "
            f"from another one; a run takes the one before it once this folder is moved away"
        ) from error
    for index, chunk in enumerate(chunks):
        # Not strict: modules of Transformer Engine expect an extra state that the checkpoint may not have.
        with _pickled_state_allowed(optimizer is not None):
            missing, unexpected = chunk.load_state_dict(loaded[f"model{index}"], strict=False)
        wrong = [n for n in (*missing, *unexpected) if not n.endswith("_extra_state") and n not in absent | left_out]
        if wrong:
            raise ValueError(f"{path} does not fit the model, {len(wrong)} parameters: {', '.join(wrong[:20])}")
    if optimizer is not None:
        load_optimizer_state(optimizer, loaded["optimizer"])
    return info


def sharded_state(chunks: Sequence[nn.Module], optimizer=None, *, is_loading: bool = False) -> ShardedStateDict:
    """What Megatron saves or loads for these chunks."""
    state: ShardedStateDict = {
        f"model{index}": chunk.sharded_state_dict(metadata=_metadata()) for index, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        model_state = {key: value for part in list(state.values()) for key, value in part.items()}
        if len(chunks) > 1:
            model_state = dict(state)
        state["optimizer"] = optimizer_sharded_state(
            optimizer, model_state, is_loading=is_loading, metadata=_metadata()
        )
    return state


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": OPTIMIZER_SHARDING,
        # Gathered over gloo on the first data-parallel rank. The other way is an all-gather on every GPU: eight bytes
        # for each parameter of the rank in one piece, which a GPU that holds a model and its gradients has not free,
        # and twelve bytes for each in every rank's host memory.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _check_shapes(path: str | Path, state: ShardedStateDict, stored: dict[str, ShardedBase]) -> None:
    """Megatron would name one tensor's parts; what has to be changed is seen from whole shapes."""
    wrong = []
    for entry in (e for part, entries in state.items() if part.startswith("model") for e in entries.values()):
        # What is built from several stored tensors has no shape of its own.
        if isinstance(entry, ShardedTensor) and not entry.allow_shape_mismatch and entry.key in stored:
            found = stored[entry.key].global_shape
            if tuple(found) != tuple(entry.global_shape):
                wrong.append(f"{entry.key} is {tuple(found)}, needed {tuple(entry.global_shape)}")
    if wrong:
        raise ValueError(
            f"{path} does not fit the model, {len(wrong)} tensor(s) of this rank have another shape, such as "
            f"{wrong[0]}: use the model folder and model.* settings that it was trained with"
        )


def _stored_key(entry: ShardedBase) -> str:
    return entry.unique_key if isinstance(entry, ShardedObject) else entry.key


@contextlib.contextmanager
def _pickled_state_allowed(is_allowed: bool) -> Iterator[None]:
    before = os.environ.get(PICKLED_STATE)
    try:
        if is_allowed:
            os.environ[PICKLED_STATE] = "1"
        yield
    finally:
        os.environ.pop(PICKLED_STATE, None)
        if before is not None:
            os.environ[PICKLED_STATE] = before


def _drop_absent(state: ShardedStateDict, present: set[str]) -> set[str]:
    """Remove the model entries that the checkpoint lacks, on all ranks' behalf, and name their tensors."""
    absent = set()
    for part, entries in state.items():
        if not part.startswith("model"):
            continue
        for name in [n for n, entry in entries.items() if hasattr(entry, "key") and _stored_key(entry) not in present]:
            if not name.endswith("_extra_state"):
                absent.add(name)
            del entries[name]
    return absent


def _refuse_unmerged(path: str | Path, state: ShardedStateDict, present: set[str]) -> None:
    """Weights whose adapters were left out would be those from before the training."""
    adapters = {key for key in present if "_adapter.lora_" in key and not key.startswith("optimizer.")}
    if not adapters:
        return
    # Each pipeline stage has the adapters of its own layers.
    wanted: list[set[str | None]] = [set()] * dist.get_world_size()
    mine = {getattr(value, "key", None) for entries in state.values() for value in entries.values()}
    dist.all_gather_object(wanted, mine & adapters)
    missing = adapters.difference(*wanted)
    if missing:
        raise ValueError(
            f"{path} holds {len(missing)} adapter tensors that are not merged into its weights, and this model has no "
            f"such adapters: resume the run that wrote it with its adapter settings; the checkpoint at its end holds "
            f"merged weights"
        )
