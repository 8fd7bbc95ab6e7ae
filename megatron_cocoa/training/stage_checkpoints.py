"""The checkpoints of one stage that a run can be resumed from: where they lie, which is the last, which may go."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

from megatron_cocoa.checkpoint.info import CheckpointInfo, is_complete
from megatron_cocoa.checkpoint.store import load_checkpoint, save_checkpoint
from megatron_cocoa.checkpoint.writer import CheckpointWriter, discard, remove_incomplete
from megatron_cocoa.model.adapters import merged_adapters
from megatron_cocoa.model.build import Model
from megatron_cocoa.parallel import topology

BEST = "best"
"""Folder of a stage's best weights, as its validation finds them."""

_NAME = re.compile(r"step-(\d{8})")


class StageCheckpoints:
    """Checkpoints ``folder/step-00000123`` with weights, optimizer state and progress.

    Args:
        folder: of the stage's checkpoints; nothing else lives there.
        keep: how many of the newest are kept.
        asynchronous: write in the background.
        check_owner: as ``CheckpointWriter`` takes it.
    """

    def __init__(
        self, folder: Path, *, keep: int, asynchronous: bool, check_owner: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self.keep = folder, keep
        self._writer = CheckpointWriter(asynchronous=asynchronous, check_owner=check_owner)

    def save(self, model: Model, optimizer, info: CheckpointInfo) -> None:
        """Write the checkpoint of ``info.step``; every rank calls it.

        Raises:
            ValueError: if it, or the one before it, could not or must not be written.
        """
        save_checkpoint(self._path(info.step), model.bare_chunks, info, optimizer=optimizer, writer=self._writer)
        self._remove_old()

    def poll(self) -> None:
        """Complete a background write if it is done. Every rank calls it once a step."""
        if self._writer.poll():
            self._remove_old()

    def wait(self) -> None:
        """Wait for a background write and complete it; every rank calls it."""
        self._writer.wait()
        self._remove_old()

    def save_best(self, model: Model, info: CheckpointInfo) -> None:
        """Write the weights to ``best`` beside the folder, over those of an earlier step; every rank calls it.

        No optimizer state, and adapters are merged: an ordinary checkpoint to start from or to export.

        Raises:
            ValueError: if they, or the checkpoint before them, could not be written.
        """
        with merged_adapters(model):
            save_checkpoint(self.folder.parent / BEST, model.bare_chunks, info, writer=self._writer)

    def load(self, step: int, model: Model, optimizer) -> CheckpointInfo:
        """Fill ``model`` and ``optimizer`` from the checkpoint of ``step``; every rank calls it.

        Raises:
            ValueError: if it is not complete, or does not fit the model.
        """
        return load_checkpoint(self._path(step), model.bare_chunks, optimizer=optimizer)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _remove_old(self) -> None:
        if not topology.is_first_rank():
            return
        # A file system that fails for a while ends no run here: the next time will do.
        with contextlib.suppress(OSError):
            for step in complete_steps(self.folder)[: -self.keep]:
                discard(self._path(step), self._path(step))


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted write or removal of a checkpoint left below ``folder``; one rank calls it."""
    remove_incomplete(folder, "step-*")


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints below ``folder``, oldest first.

    Raises:
        OSError: as ``is_complete``.
    """
    return [step for step, path in step_folders(folder) if is_complete(path)]


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint below ``folder`` that has its name, complete or not, oldest first."""
    names = [(_NAME.fullmatch(path.name), path) for path in sorted(folder.glob("step-*"))] if folder.is_dir() else []
    return [(int(name[1]), path) for name, path in names if name]
