"""What a rank runs: a named check of one world size. All checks of a world size share one launch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

MODULES = (
    "tests.parity.checks",
    "tests.distributed.adapters",
    "tests.distributed.collectives",
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
    """``run`` is called on every rank of a world of ``world_size`` and returns what the test asserts on, as JSON."""

    world_size: int
    run: Callable[[], dict | None]


def all_checks() -> dict[str, Check]:
    checks: dict[str, Check] = {}
    for module in MODULES:
        checks |= importlib.import_module(module).CHECKS
    return checks


def degrees(tp: int = 1, pp: int = 1, cp: int = 1, vpp: int | None = None, **more) -> dict:
    """Of ``ParallelSettings``, by the names that layouts go by, and further fields of it."""
    return dict(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=vpp,
        **more,
    )
