"""Writing a rank's part of a checkpoint by threads of one process, whose end is seen.

Megatron-Core 0.16 forks a further process for each file and waits for all of them, without a time limit and without
looking whether they live: one that the kernel kills for want of memory would hold its rank for ever, and all others for
as long as they wait for files. Later releases write by threads as well, but lose the cause of what fails in one.
"""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, _disable_gc
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync


def by_threads(request: AsyncRequest) -> AsyncRequest:
    """Megatron's ``request`` to write this rank's part, with threads of ours; as it is where the rank has no part."""
    if request.async_fn is None:
        return request
    # A partial of FileSystemWriterAsync.write_preloaded_data_multiproc, in later releases of ..._multithread.
    transforms, use_msc = request.async_fn.args
    return request._replace(async_fn=_write, async_fn_kwargs={"transforms": transforms, "use_msc": use_msc})


# Of tensors that the forked process shares with its rank, none must be freed there.
@_disable_gc()
def _write(rank: int, buckets: list, results: Any, *, transforms: list, use_msc: bool) -> None:
    """Write each of ``buckets`` to its file, and put into ``results`` what Megatron's last steps take from there.

    That is the files' write results by index, or what ended one of them.
    """
    done: queue.Queue = queue.Queue()

    def write(index: int) -> None:
        FileSystemWriterAsync.write_preloaded_data(
            transforms, index, buckets[index], done, _Uncounted(), True, use_msc=use_msc
        )

    with ThreadPoolExecutor(len(buckets)) as threads:
        list(threads.map(write, range(len(buckets))))
    written = dict(done.get_nowait() for _ in buckets)
    results.put(next((found for found in written.values() if isinstance(found, Exception)), written))


class _Uncounted:
    """Stands for the queue from which Megatron's processes take a number each when they are done."""

    def get(self) -> None:
        pass

    def task_done(self) -> None:
        pass
