"""What a rank runs: a named check of one world size. All checks of a world size share one launch."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MODULES = (
    "tests.parity.checks",
    "tests.distributed.adapters",
    "tests.distributed.collectives",
    "tests.distributed.combinations",
    "tests.distributed.converting",
    "tests.distributed.faults",
    "tests.distributed.hosts",
    "tests.distributed.mask_kinds",
    "tests.distributed.memory",
    "tests.distributed.mmeb",
    "tests.distributed.readers",
    "tests.distributed.resuming",
    "tests.distributed.training",
    "tests.distributed.writers",
    "tests.distributed.gradients",
    "tests.distributed.caching",
    "tests.distributed.temperature",
)
"""Each holds ``CHECKS``: its checks by name."""


@dataclass(frozen=True)
class Check:
    """``run`` is called on every rank of a world of ``world_size`` and returns what the test asserts on, as JSON.

    after: names of checks whose files it reads, in ``shared_folder``. They run before it: in an earlier turn, in a
           smaller world, or above it in the list of checks.
    turn:  the worlds of a turn are started one after the other, the smallest first, once those of earlier turns are
           done.
    """

    world_size: int
    run: Callable[[], dict | None]
    after: tuple[str, ...] = ()
    turn: int = 0

    @property
    def launch(self) -> tuple[int, int]:
        """What the checks that run in one launch have in common."""
        return self.turn, self.world_size


def all_checks() -> dict[str, Check]:
    checks: dict[str, Check] = {}
    for module in MODULES:
        checks |= importlib.import_module(module).CHECKS
    return checks


def shared_folder() -> Path:
    """What a check writes there, later checks of the session find, in worlds of any size."""
    return Path(os.environ["SHARED_FOLDER"])


def degrees(tp: int = 1, pp: int = 1, cp: int = 1, vpp: int | None = None, **more) -> dict:
    """Of ``ParallelSettings``, by the names that layouts go by, and further fields of it."""
    return dict(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=vpp,
        **more,
    )
