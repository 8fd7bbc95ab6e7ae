"""Checks of writes in the background: what all ranks do when one rank's process is killed, or another run begins."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import state_dict_utils
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint import FileSystemReader

from megatron_cocoa.checkpoint.info import OPTIMIZER_SHARDING
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.checkpoint.writer import CheckpointWriter, remove_incomplete
from megatron_cocoa.config import ParallelSettings
from megatron_cocoa.parallel import fp8_parameters, topology
from megatron_cocoa.training.output_owner import OutputOwner
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

    state = {"w": _part("w", float(rank))}
    writer, message = CheckpointWriter(asynchronous=True), ""
    with rank_folders() as (_, shared):
        with pytest.MonkeyPatch.context() as patch:
            if rank == size - 1:
                patch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(killed_in_the_middle))
            writer.write(shared / "one", state, **HOW)
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
        state["v"] = _part("v", 0.0)
        writer.write(shared / "two", state, **HOW)
        writer.wait()
        # Megatron-Core 0.19 lists what all ranks share as well.
        indexed = sum(part.fqn in state for part in FileSystemReader(shared / "two").read_metadata().storage_data)
    return _gathered(messages=message, waited=waited, left=left, indexed=indexed)


def recycled() -> dict:
    """What is written of ones and twos where memory that a rank no longer needs is filled with something else.

    Such is a GPU's pinned memory: a forked process shares it, and torch hands it on.
    """
    topology.set_layout(ParallelSettings(), seed=0)
    write_preloaded_data = FileSystemWriterAsync.write_preloaded_data
    may_write = multiprocessing.get_context("fork").Event()

    def lent(tensor):
        memory = tensor.clone().share_memory_()
        tensor = memory.view_as(memory)
        weakref.finalize(tensor, memory.fill_, -1.0)
        return tensor

    def preload_tensors(buckets, non_blocking=True):
        return [
            (file, key, (data, [(item, lent(tensor)) for item, tensor in tensors]))
            for file, key, (data, tensors) in buckets
        ]

    def late(*args, **kwargs):
        assert may_write.wait(60)
        return write_preloaded_data(*args, **kwargs)

    writer = CheckpointWriter(asynchronous=True)
    with rank_folders() as (_, shared), pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemWriterAsync, "preload_tensors", staticmethod(preload_tensors))
        patch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(late))
        writer.write(shared / "one", {"w": _part("w", dist.get_rank() + 1.0)}, **HOW)
        may_write.set()
        writer.wait()
        return {"written": TorchDistReader(shared / "one").read("w").tolist()}


class Rounded(torch.Tensor):
    """Stands for a weight in FP8, which keeps its form wherever it is copied to, and holds halves of its values."""

    def dequantize(self, **kwargs) -> torch.Tensor:
        return 2 * self.as_subclass(torch.Tensor)


def rounded() -> dict:
    """What is written of weights in FP8, and of which class."""
    topology.set_layout(ParallelSettings(), seed=0)
    classes = []
    write_preloaded_data = FileSystemWriterAsync.write_preloaded_data

    def watched(transforms, index, bucket, *args, **kwargs):
        classes.extend(type(tensor).__name__ for _, tensor in bucket[2][1])
        return write_preloaded_data(transforms, index, bucket, *args, **kwargs)

    def preload_tensors(buckets, non_blocking=True):
        return buckets

    with rank_folders() as (_, shared), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_parameters, "is_float8tensor", lambda tensor: isinstance(tensor, Rounded))
        patch.setattr(fp8_parameters, "dequantize_fp8_tensor", Rounded.dequantize)
        patch.setattr(FileSystemWriterAsync, "preload_tensors", staticmethod(preload_tensors))
        patch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(watched))
        part = _part("w", 0.5)
        part.data = part.data.as_subclass(Rounded)
        CheckpointWriter().write(shared / "one", {"w": part}, **HOW)
        return {"written": TorchDistReader(shared / "one").read("w").tolist(), "classes": classes}


def validated() -> dict:
    """How often ranks had told each other how their states are cut, after each of several writes.

    Also what the last one wrote.
    """
    topology.set_layout(ParallelSettings(), seed=0)
    tell, told, writer = state_dict_utils.determine_global_metadata, [], CheckpointWriter()
    with rank_folders() as (_, shared), pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_dict_utils, "determine_global_metadata", lambda state: told.append(state) or tell(state))
        counts = []
        for name, parts in (("one", "w"), ("two", "w"), ("best", "v"), ("three", "w")):
            writer.write(shared / name, {part: _part(part, dist.get_rank() + 0.5) for part in parts}, **HOW)
            counts.append(len(told))
        return {"counts": counts, "written": TorchDistReader(shared / "three").read("w").tolist()}


def without_memory(*, asynchronous: bool) -> dict:
    """What each rank is told where the last rank's host has no memory left for its part, and what lies there then."""
    topology.set_layout(ParallelSettings(), seed=0)

    def preload_tensors(buckets, non_blocking=True):
        raise RuntimeError("CUDA error: out of memory")

    message = ""
    with rank_folders() as (_, shared):
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == dist.get_world_size() - 1:
                patch.setattr(FileSystemWriterAsync, "preload_tensors", staticmethod(preload_tensors))
            writer = CheckpointWriter(asynchronous=asynchronous)
            try:
                writer.write(shared / "one", {"w": _part("w", 1.0)}, **HOW)
                writer.wait()
            except ValueError as error:
                message = str(error)
        # Nobody looks before the first rank has removed what is incomplete.
        dist.barrier()
        left = sorted(path.name for path in shared.glob("one*"))
    return _gathered(messages=message, left=left)


def taken_over(*, when: str) -> dict:
    """What each rank is told where another run takes the folder, and what lies there in the end.

    Args:
        when: ``before`` a checkpoint is written, while it is ``under way``, whose folder the other run then removes, or
            ``after`` that run has removed what it found.
    """
    topology.set_layout(ParallelSettings(), seed=0)
    state, message = {"w": _part("w", 1.0)}, ""
    with rank_folders() as (_, shared):
        owner = OutputOwner(shared)
        if topology.is_first_rank():
            owner.claim()
        writer = CheckpointWriter(asynchronous=True, check_owner=owner.check)
        writer.write(shared / "kept", state, **HOW)
        writer.wait()
        try:
            if when != "before":
                writer.write(shared / "lost", state, **HOW)
            if topology.is_first_rank():
                OutputOwner(shared).claim()
                if when == "under way":
                    remove_incomplete(shared, "lost")
            if when == "before":
                writer.write(shared / "lost", state, **HOW)
            writer.wait()
        except ValueError as error:
            message = str(error)
        # Nobody looks before the first rank has removed what is incomplete.
        dist.barrier()
        left = sorted(path.name for path in shared.iterdir() if path.is_dir())
    return _gathered(messages=message, left=left)


def _part(name: str, value: float) -> ShardedTensor:
    """This rank's four numbers of a tensor."""
    return ShardedTensor.from_rank_offsets(name, torch.full((4,), value), (0, dist.get_rank(), dist.get_world_size()))


def _gathered(**own) -> dict[str, list]:
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {name: [found[name] for found in everyone] for name in own}


HOW = dict(content_metadata={"distrib_optim_sharding_type": OPTIMIZER_SHARDING}, info={"step": 1})
KILLED = {f"writer-killed-{how}": Check(2, functools.partial(killed, complete=how)) for how in ("poll", "wait")}
TAKEN_OVER = {
    f"writer-taken-over-{when.replace(' ', '-')}": Check(2, functools.partial(taken_over, when=when))
    for when in ("before", "under way", "after")
}
RECYCLED = {"writer-recycled": Check(2, recycled)}
WITHOUT_MEMORY = {
    f"writer-without-memory-{'background' if asynchronous else 'at-once'}": Check(
        2, functools.partial(without_memory, asynchronous=asynchronous)
    )
    for asynchronous in (True, False)
}
ROUNDED = {"writer-rounded": Check(2, rounded)}
VALIDATED = {"writer-validated": Check(2, validated)}
CHECKS = KILLED | TAKEN_OVER | RECYCLED | WITHOUT_MEMORY | ROUNDED | VALIDATED
