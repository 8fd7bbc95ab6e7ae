"""Writing a distributed checkpoint so that its name stands for a complete one, at once or in the background.

Megatron's ``dist_checkpointing`` plans the write on all ranks and leaves the bytes to a process that each rank forks.
What it writes stands beside its place, and takes its name when every rank is done and ``cocoa.json`` lies in it: a
folder that carries the final name is complete. A write that fails on any rank fails on all of them, with the cause.

The name beside its place is new for each write. A forked writer ends with its rank, but those of other hosts may live
on for a while, and the run that goes on may write the checkpoint of the same step then: in one folder the two would cut
each other's files. A run that takes a folder over from one that still lives renames what that one has not completed, so
that it never will: of two renames of a folder, one fails.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import json
import os
import shutil
import signal
import socket
import uuid
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_cocoa.checkpoint.bucket_threads import by_threads
from megatron_cocoa.checkpoint.helper_process import end_with_parent, start_results_queue
from megatron_cocoa.checkpoint.info import INFO_FILE
from megatron_cocoa.checkpoint.placement import INCOMPLETE_SUFFIX, REPLACED_SUFFIX, force_to_disk, sync_folder
from megatron_cocoa.parallel import topology
from megatron_cocoa.parallel.collectives import on_first_rank
from megatron_cocoa.parallel.fp8_parameters import whole_values

INDEX_BYTES = 2**26
"""Room that a checkpoint's index is sure to find; some kilobytes for each tensor of each rank."""


class CheckpointWriter:
    """Writes one checkpoint after the other; every rank calls every method.

    Args:
        asynchronous: ``write`` returns when the state is safe from further training steps (copied to the host, or
            held by the forked process), and ``poll`` or ``wait`` completes it.
        check_owner: called on the first rank before anything is made and before a checkpoint gets its name; raises
            ValueError if another run has taken the output folder over.
    """

    def __init__(self, *, asynchronous: bool = False, check_owner: Callable[[], None] = lambda: None) -> None:
        self._check_owner = check_owner
        # A persistent worker process dies at once on megatron-core 0.16.1 and leaves its parent waiting.
        self._queue = AsyncCallsQueue(persistent=False) if asynchronous else None
        self._process: BaseProcess | None = None
        self._validated: set[frozenset[str]] = set()

    def write(
        self, path: Path, state: ShardedStateDict, *, content_metadata: dict[str, Any], info: dict[str, Any]
    ) -> None:
        """Write ``state`` and ``info``; an earlier write is completed first.

        Args:
            path: the folder; one that is there already is replaced when the new one is complete.
            state: Megatron's sharded state of this rank.
            content_metadata: Megatron's note on how the state is sharded.
            info: contents of ``cocoa.json``; the first rank's are written.

        Raises:
            ValueError: if this or the earlier checkpoint cannot or may not be written; nothing is kept of it.
        """
        self.wait()
        # How the state is cut stays as it is. To compare what all ranks say of it takes the first one 8 seconds at 512
        # ranks, while the others wait.
        parts = frozenset(state)
        is_new = parts not in self._validated
        on_first_rank(self._check_owner, is_long=True)
        start_results_queue(filesystem_async)
        work = on_first_rank(lambda: _prepare(path), f"cannot write a checkpoint under {path.parent}", is_long=True)
        request = self._guarded(
            path,
            work,
            lambda: dist_checkpointing.save(
                state,
                str(work),
                validate_access_integrity=is_new,
                async_sharded_save=True,
                content_metadata=content_metadata,
                **_async_strategy(),
            ),
        )
        self._validated.add(parts)
        finish = functools.partial(self._finish, path, work, request.finalize_fns, info)
        request = self._guarded(path, work, lambda: _staged(by_threads(request)))._replace(finalize_fns=[])
        if self._queue is None:
            self._guarded(path, work, lambda: _put_on_disk(request))
            finish()
        else:
            self._queue.schedule_async_request(_in_process(request)._replace(finalize_fns=[finish]))
            self._process = self._queue.async_calls[-1].async_caller.process

    def poll(self) -> bool:
        """Complete a write that is done on all ranks; whether one was.

        Raises:
            ValueError: as ``write``.
        """
        return self._queue is not None and bool(self._queue.maybe_finalize_async_calls(blocking=False))

    def wait(self) -> None:
        """Return when nothing is under way any more.

        Raises:
            ValueError: as ``write``.
        """
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=True)

    def _finish(self, path: Path, work: Path, megatron_steps: list, info: dict[str, Any]) -> None:
        """Megatron's own last steps (its index of what was written), then ours: description and name."""
        dist.barrier(group=topology.file_group())
        process, self._process = self._process, None
        self._guarded(path, work, lambda: _check_ended_well(process))
        # What Megatron writes here it writes on the first rank, whose failure the others would not see.
        self._guarded(path, work, lambda: _check_room(work, INDEX_BYTES))
        for step in megatron_steps:
            self._guarded(path, work, step)
        failure = f"cannot complete the checkpoint {path}"
        on_first_rank(lambda: self._put_in_place(path, work, info), failure, is_long=True)

    def _put_in_place(self, path: Path, work: Path, info: dict[str, Any]) -> None:
        """Describe what is in ``work``, force it to the disk, and only then give it the name."""
        try:
            (work / INFO_FILE).write_text(json.dumps(info, indent=1), encoding="utf-8")
            force_to_disk(work)
            self._check_owner()
            _rename(path, work)
        except OSError:
            # Another run that has begun removes what is not complete.
            self._check_owner()
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _guarded(self, path: Path, work: Path, action: Callable[[], Any]) -> Any:
        """Run a part of a write on every rank; if it fails on one, all raise and the incomplete folder goes.

        Raises:
            ValueError: with the first rank's reason to fail, or that another run has removed the folder.
        """
        reason = result = None
        try:
            result = action()
        except _WriterEnded as error:
            reason = str(error)
        except (OSError, EOFError, RuntimeError, CheckpointException) as error:
            # torch's CheckpointException is no Exception, and carries each rank's cause. Without its process, the queue
            # of results raises EOFError.
            cause = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
            reason = f"free space on its disk, or name another output_dir. Cause: {cause}"
        reasons: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason, group=topology.file_group())
        first = next((r for r in reasons if r is not None), None)
        if first is None:
            return result
        if dist.get_rank() == 0:
            shutil.rmtree(work, ignore_errors=True)
        on_first_rank(self._check_owner, is_long=True)
        raise ValueError(f"the checkpoint {path} could not be written, nothing was kept of it; {first}")


def restore_replaced(path: Path) -> None:
    """Give a checkpoint its name back if a run was ended just between the two renames that replace it."""
    previous = path.with_name(path.name + REPLACED_SUFFIX)
    if previous.exists() and not path.exists():
        previous.rename(path)


def _async_strategy() -> dict[str, str]:
    """From 0.17 on Megatron prefers a package of its own for asynchronous saves; its built-in one needs none."""
    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


def _staged(request: AsyncRequest) -> AsyncRequest:
    """``request`` with copies of a GPU's tensors in host memory, which live as long as it does: until all is written.

    They lie in pinned memory, which a forked process does not copy but share. Megatron-Core 0.16 drops them as soon as
    it has forked; torch then gives their memory to the next batch, and the process writes that in their place.

    Weights in FP8 are written as what they stand for, as later releases do: Transformer Engine would keep its own form
    on the host as well, which no reader of checkpoints knows.
    """
    if request.preload_fn is None:
        return request
    # A partial of FileSystemWriterAsync.preload_tensors.
    preload, (buckets, *how) = request.preload_fn.func, request.preload_fn.args
    whole = [
        (file, key, (data, [(item, whole_values(tensor)) for item, tensor in tensors]))
        for file, key, (data, tensors) in buckets
    ]
    rank, _, results = request.async_fn_args
    return request._replace(async_fn_args=(rank, preload(whole, *how), results), preload_fn=None)


def _in_process(request: AsyncRequest) -> AsyncRequest:
    """``request`` for a process that its rank forks, and that ends with it.

    Without its rank nothing of it will be completed. And as long as the process lives, a GPU keeps the memory of the
    rank, whose open files it shares: the rank that torchrun starts in its place would find the GPU full.
    """
    if request.async_fn is None:
        return request
    return request._replace(async_fn=functools.partial(_write_in_process, request.async_fn))


def _write_in_process(write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    end_with_parent()
    write(*args, **kwargs)


def _put_on_disk(request: AsyncRequest) -> None:
    """``AsyncRequest.execute_sync`` without its barrier, which waits no longer than a GPU's collectives do."""
    if request.async_fn is not None:
        request.async_fn(*request.async_fn_args, **request.async_fn_kwargs)


class _WriterEnded(Exception):
    """The process that wrote a rank's part has ended without having written it."""


def _check_ended_well(process: BaseProcess | None) -> None:
    """Say how the process ended that wrote this rank's part in the background, unless it ended well.

    Raises:
        _WriterEnded: naming rank and host, since a look at their memory comes next.
    """
    if process is None or not process.exitcode:
        return
    place = f"the process that wrote the part of rank {dist.get_rank()} on host {socket.gethostname()}"
    if process.exitcode < 0:
        raise _WriterEnded(
            f"{place} was ended by {signal.Signals(-process.exitcode).name}. The kernel does so where a host runs out "
            f"of memory: give it more, set data.num_workers lower, or checkpoint.asynchronous to false"
        )
    raise _WriterEnded(f"{place} ended with status {process.exitcode}: its error stands above, in the log of that rank")


def _rename(path: Path, work: Path) -> None:
    """Give ``work`` the name, in place of an earlier checkpoint."""
    previous = path.with_name(path.name + REPLACED_SUFFIX)
    if path.exists():
        discard(previous, path)
        path.rename(previous)
    work.rename(path)
    sync_folder(path.parent)
    discard(previous, path)


def _prepare(path: Path) -> Path:
    """A new folder to write ``path`` into, once earlier ones are gone and the disk is seen to take a file.

    Megatron's first file is written by one rank alone, whose failure the others would not see.
    """
    restore_replaced(path)
    remove_incomplete(path.parent, path.name)
    work = _beside(path)
    work.mkdir(parents=True)
    probe = work / "probe"
    probe.write_bytes(bytes(2**18))
    probe.unlink()
    return work


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {free} bytes are free, needed {num_bytes}")


def _beside(path: Path) -> Path:
    """A name that nothing has, of those that ``remove_incomplete`` removes."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{INCOMPLETE_SUFFIX}")


def discard(folder: Path, path: Path) -> None:
    """Remove ``folder``, a checkpoint that nobody needs, under a name that no reader takes for one; on one rank.

    What cannot be removed, such as files that somebody reads over NFS, goes with what is left of writes of ``path``.
    """
    going = _beside(path)
    with contextlib.suppress(OSError):
        folder.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def remove_incomplete(folder: Path, name: str) -> None:
    """Remove what was left of writes of ``folder/name`` (a pattern of glob); on one rank.

    Each is renamed first: whoever still writes it can give it no other name while its files go. It may also put files
    into the folder and keep it from going. Nothing is lost: no reader takes it for a checkpoint, and the next write
    tries again.
    """
    for left in folder.glob(f"{name}.*{INCOMPLETE_SUFFIX.removeprefix('.')}") if folder.is_dir() else []:
        # Without what ``_beside`` adds.
        discard(left, left.with_suffix("").with_suffix(""))
