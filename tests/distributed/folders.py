"""Folders of a check that runs on several ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist


@contextmanager
def rank_folders() -> Iterator[tuple[Path, Path]]:
    """An empty folder of this rank's own, and the first rank's, which all can write to; collective.

    Both go at the end, when every rank is done with the shared one.
    """
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared, src=0)
        yield Path(own), Path(shared[0])
        dist.barrier()
