"""Checks of what one rank of a host makes for all of its ranks."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch.distributed as dist

from megatron_cocoa.parallel import host
from megatron_cocoa.parallel.host import once_per_host
from tests.distributed.check import Check

VALUE = {"name": "rows", "bytes": np.arange(1000, dtype=np.uint8), "ends": np.arange(5), "none": np.zeros(0)}


class _Make:
    """Counts its calls; fails on the ranks ``failing``, at the call named there."""

    def __init__(self, failing: dict[int, int]) -> None:
        self.calls, self.failing = 0, failing

    def __call__(self) -> dict:
        self.calls += 1
        if self.failing.get(dist.get_rank()) == self.calls:
            raise OSError(f"rank {dist.get_rank()} finds no rows")
        return {**VALUE, "rank": dist.get_rank()}


def _gathered(value: object) -> list:
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def _mapped() -> list[str]:
    """The files without a name that this process maps or holds open."""
    # The folder itself is open while it is listed, under a number that is gone afterwards.
    numbers = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    held = [os.readlink(path) for path in numbers if os.path.islink(path)]
    mapped = [line.split(maxsplit=4)[4] for line in Path("/proc/self/maps").open()]
    return [name for name in (*mapped, *held) if "memfd:once_per_host" in name or name.startswith("/dev/shm/#")]


def made(
    *,
    hosts: list[int] | None = None,
    wanted: list[int] | None = None,
    failing: dict[int, int] | None = None,
    blind: tuple[int, ...] = (),
    memory: str = "memfd",
) -> dict:
    """What each rank made and got.

    Args:
        hosts: by rank; None for what is.
        wanted: ranks that want the value; None for all.
        failing: see ``_Make``.
        blind: ranks that cannot open other processes' files.
        memory: what hosts give: ``memfd``, ``old`` (no such call), or ``full``, which fails once written to.
    """
    rank, make, got, error = dist.get_rank(), _Make(failing or {}), None, ""
    with ExitStack() as changed:
        if hosts is not None:
            changed.enter_context(patch.object(host, "_host", lambda: hosts[rank]))
        if rank in blind:
            changed.enter_context(patch.object(host, "open", _refused, create=True))
        if memory == "old":
            changed.enter_context(patch.object(host, "os", _OldPython()))
        elif memory == "full":
            changed.enter_context(
                patch.object(host, "_file_without_name", lambda: open("/dev/full", "wb", buffering=0))
            )
        try:
            got = once_per_host(make, is_wanted=wanted is None or rank in wanted)
        except ValueError as found:
            error = str(found)
    arrays = [] if got is None else [got[name] for name in ("bytes", "ends", "none")]
    found = {
        "calls": make.calls,
        "of": None if got is None else got["rank"],
        "equal": got is None or all(np.array_equal(got[name], value) for name, value in VALUE.items()),
        "writeable": any(array.flags.writeable for array in arrays),
        "shared": sorted(set(_mapped())),
        "said": error,
    }
    del got, arrays
    found["left"] = _mapped()
    columns = _gathered(found)
    return {name: [column[name] for column in columns] for name in found}


class _OldPython:
    """``os`` as it is where Python was built for a C library without ``memfd_create``."""

    def __getattr__(self, name: str) -> object:
        if name == "memfd_create":
            raise AttributeError(name)
        return getattr(os, name)


def _refused(path: str, mode: str, **options) -> None:
    if mode == "rb":
        raise PermissionError(f"{path} is hidden")
    return open(path, mode, **options)


CASES: dict[str, tuple[int, Callable[[], dict]]] = {
    "host-all": (4, made),
    "host-two": (4, functools.partial(made, hosts=[0, 1, 1, 0])),
    "host-lone": (2, functools.partial(made, hosts=[0, 1])),
    "host-some-want": (4, functools.partial(made, wanted=[1, 3])),
    "host-fails": (4, functools.partial(made, hosts=[0, 0, 1, 1], failing={2: 1})),
    "host-blind": (4, functools.partial(made, blind=(2,))),
    "host-old": (3, functools.partial(made, memory="old")),
    "host-full": (3, functools.partial(made, memory="full")),
    "host-blind-fails": (4, functools.partial(made, blind=(2,), failing={2: 1})),
}

CHECKS = {name: Check(size, run) for name, (size, run) in CASES.items()}
