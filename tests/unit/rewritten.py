"""Checkpoints with changed tensors."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.checkpoint.torch_dist_writer import TorchDistWriter


def rewrite_checkpoint(
    folder: Path, target: Path, change: Callable[[dict[str, Tensor]], None], *, more_states: Sequence[str] = ()
) -> Path:
    """Copy a checkpoint with its tensors changed by ``change``, a function of the dictionary of all of them.

    The empty states ``more_states`` are added.
    """
    written = shutil.ignore_patterns("*.distcp", ".metadata", "metadata.json", "common.pt")
    shutil.copytree(folder, target, ignore=written)
    with TorchDistReader(folder) as reader:
        tensors = {key: reader.read(key) for key in reader.keys()}
        states = reader.state_keys()
    change(tensors)
    with TorchDistWriter(target) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor, shape=tensor.shape, offset=(0,) * tensor.dim())
        for key in (*states, *more_states):
            writer.write_empty_state(key)
        writer.finish()
    return target
