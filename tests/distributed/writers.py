"""Checks of the processes that write checkpoints in the background: what all ranks do when one rank's is killed."""

from __future__ import annotations

import functools
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint import FileSystemReader

from megatron_cocoa.checkpoint.store import OPTIMIZER_SHARDING
from megatron_cocoa.checkpoint.writer import CheckpointWriter
from megatron_cocoa.config import ParallelSettings
from megatron_cocoa.parallel import topology
from tests.distributed.check import Check
from tests.distributed.folders import rank_folders


def killed(*, complete: str) -> dict:
    """What each rank is told where the kernel kills the last rank's writer, how soon, and what is left of the write.

    Also how many parts of two tensors the index of the next checkpoint has.

    Args:
        complete: by ``poll`` at the end of a step, or ``wait``, as before the next write.
    """
    topology.set_layout(ParallelSettings(), seed=0)
    rank, size = dist.get_rank(), dist.get_world_size()
    write_preloaded_data = FileSystemWriterAsync.write_preloaded_data
    trainer = os.getpid()

    def killed_in_the_middle(*args, **kwargs):
        if os.getpid() != trainer:
            os.kill(os.getpid(), signal.SIGKILL)
        return write_preloaded_data(*args, **kwargs)

    state = {"w": ShardedTensor.from_rank_offsets("w", torch.full((4,), float(rank)), (0, rank, size))}
    how = dict(content_metadata={"distrib_optim_sharding_type": OPTIMIZER_SHARDING}, info={"step": 1})
    writer, message = CheckpointWriter(asynchronous=True), ""
    with rank_folders() as (_, shared):
        with pytest.MonkeyPatch.context() as patch:
            if rank == size - 1:
                patch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(killed_in_the_middle))
            writer.write(shared / "one", state, **how)
            begun = time.monotonic()
            try:
                if complete == "wait":
                    writer.wait()
                while complete == "poll" and not writer.poll():
                    time.sleep(0.01)
            except ValueError as error:
                message = str(error)
            waited = time.monotonic() - begun
        # Nobody looks before the first rank has removed what is incomplete.
        dist.barrier()
        left = sorted(path.name for path in shared.glob("one*"))
        state["v"] = ShardedTensor.from_rank_offsets("v", torch.zeros(4), (0, rank, size))
        writer.write(shared / "two", state, **how)
        writer.wait()
        indexed = len(FileSystemReader(shared / "two").read_metadata().storage_data)
        found = (message, waited, left, indexed)
        everyone: list = [None] * size
        dist.all_gather_object(everyone, found)
    return dict(zip(("messages", "waited", "left", "indexed"), map(list, zip(*everyone))))


CHECKS = {f"writer-killed-{how}": Check(2, functools.partial(killed, complete=how)) for how in ("poll", "wait")}
