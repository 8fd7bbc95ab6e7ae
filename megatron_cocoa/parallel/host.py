"""What one rank of a host makes for all of its ranks, in memory that they share.

The rows of a stage may take gigabytes, and minutes to read. One rank of each host puts them into a file without a name
(Linux's ``memfd_create``), which the others open through ``/proc`` and map. Nothing is on a disk that could be torn,
out of date or left behind, and the memory is free when the last process that maps it has ended, however it ended.
"""

from __future__ import annotations

import mmap
import os
import pickle
import socket
import warnings
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, TypeVar

import torch.distributed as dist

from megatron_cocoa.parallel import topology

Result = TypeVar("Result")

_ALIGNMENT = 64
"""Of arrays, in bytes: a cache line."""


@dataclass(frozen=True)
class _Place:
    """Where a value lies: a path that other processes of the host can open as long as its maker holds it open, and the
    first byte and the one past the last of its pickle, then of each of its arrays.
    """

    path: str
    spans: tuple[tuple[int, int], ...]


def once_per_host(make: Callable[[], Result], *, is_wanted: bool = True) -> Result | None:
    """What ``make`` returns, called on one rank of each host; its numpy arrays lie in memory that all of them share.

    Every rank of the world must call it at the same time, and waits as for files, see ``topology.file_group``. Without
    process groups, and where no other rank of the host wants the value, it is the one that ``make`` returned; else it
    is equal to that one, and its arrays are read-only. A rank that cannot map the memory calls ``make`` itself, and so
    does each where the host does not give such memory.

    Args:
        make: returns the same on every rank; picklable.
        is_wanted: on this rank.

    Returns:
        The value, or None where it is not wanted.

    Raises:
        ValueError: on every rank of the world, if ``make`` raised OSError or ValueError on any; names the host where
            there are several.
    """
    if not dist.is_initialized():
        return make()
    rank, hosts = dist.get_rank(), _gathered(_host() if is_wanted else None)
    maker = hosts.index(hosts[rank])
    is_shared = hosts.count(hosts[rank]) > 1
    where = f" (on host {socket.gethostname()})" if len({*hosts} - {None}) > 1 else ""
    values: list[Result] = []
    with ExitStack() as held:

        def made() -> _Place | None:
            if not is_wanted or rank != maker:
                return None
            value = make()
            place = _write(value, held) if is_shared else None
            if place is None:
                values.append(value)
            return place

        def mapped() -> None:
            if is_wanted and not values:
                values.append(make() if places[maker] is None else _map(places[maker], otherwise=make))

        places = _on_all(made, where)
        # When all have mapped it, its maker may close it.
        _on_all(mapped, where)
    return values[0] if is_wanted else None


def _host() -> Hashable:
    """Equal on ranks that can open each other's files under ``/proc``."""
    try:
        boot, processes = Path("/proc/sys/kernel/random/boot_id").read_text(), os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return dist.get_rank()
    return boot, processes, os.geteuid()


def _gathered(value: Any) -> list:
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value, group=topology.file_group())
    return everyone


def _on_all(action: Callable[[], Result], where: str) -> list[Result]:
    """Run ``action``, here and on every other rank, and return its picklable results by rank.

    Args:
        action: of this rank.
        where: it runs, to be added to what it raises.

    Raises:
        ValueError: on every rank, if it raised OSError or ValueError on any; the first rank's where several do.
    """
    result, error = None, None
    try:
        result = action()
    except (OSError, ValueError) as found:
        error = f"{found}{where}"
    outcomes = _gathered((result, error))
    for _, error in outcomes:
        if error is not None:
            raise ValueError(error)
    return [result for result, _ in outcomes]


def _write(value: object, held: ExitStack) -> _Place | None:
    """Put ``value`` where it can be mapped until ``held`` is closed; None where the host gives no memory for it."""
    arrays: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    spans = []
    try:
        file = held.enter_context(_file_without_name())
        for part in (memoryview(pickled), *(array.raw() for array in arrays)):
            start = file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
            while part:
                part = part[file.write(part) :]
            spans.append((start, file.tell()))
        # Not Python's number of this process: /proc may be that of another namespace.
        return _Place(f"/proc/{os.readlink('/proc/self')}/fd/{file.fileno()}", tuple(spans))
    except OSError as error:
        held.close()
        warnings.warn(
            f"rank {dist.get_rank()} cannot share what it read, so each rank of its host reads for itself, and takes "
            f"memory of its own for it: {error}",
            stacklevel=2,
        )
        return None


def _file_without_name() -> BinaryIO:
    try:
        return open(os.memfd_create("once_per_host"), "wb", buffering=0)
    except (AttributeError, OSError):
        # Python may be built for an older C library, and a container may refuse it. Containers make this one small.
        return TemporaryFile(dir="/dev/shm", buffering=0)


def _map(place: _Place, *, otherwise: Callable[[], Result]) -> Result:
    try:
        with open(place.path, "rb") as file:
            memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        # Where the system hides processes from each other; what is shared elsewhere then takes memory here.
        warnings.warn(f"rank {dist.get_rank()} cannot map what its host's ranks share: {error}", stacklevel=2)
        return otherwise()
    pickled, *arrays = (memory[start:end] for start, end in place.spans)
    return pickle.loads(pickled, buffers=arrays)
