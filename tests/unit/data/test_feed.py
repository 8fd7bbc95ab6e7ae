"""The processes that make packs ahead of time."""

import gc
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_cocoa.data.feed import packs_from


@dataclass(frozen=True)
class Pack:
    pid: int


class CollectingPlanner:
    """Makes packs that say where, and collects garbage there."""

    shape = SimpleNamespace(global_batch_size=1, num_ranks=1)

    def plan(self, step: int) -> list[int]:
        gc.collect()
        return [step]

    def execute(self, plan: int):
        gc.collect()
        return Pack(os.getpid()), Counter()


class LeftBehind:
    """Tells the process that frees it. It holds itself, as a DDP does, and so waits for the collector."""

    def __init__(self, told: Path) -> None:
        self.itself, self.told = self, told

    def __del__(self) -> None:
        with self.told.open("a") as file:
            file.write(f"{os.getpid()}\n")


def test_a_worker_frees_nothing_that_its_rank_has_left(tmp_path):
    """Claim: whenever a worker collects garbage, what the rank held on its GPU is given back by the rank alone."""
    told = tmp_path / "freed"
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        LeftBehind(told)
        packs = packs_from(CollectingPlanner(), 0, num_workers=1)
        (_, pack, _), *_ = (next(packs) for _ in range(3))
        assert pack.pid != os.getpid() and not told.exists()
        packs.close()
        gc.collect()
    finally:
        if was_enabled:
            gc.enable()
    assert told.read_text() == f"{os.getpid()}\n"


class ShowingPlanner:
    """Makes packs that say who planned them, and of which step."""

    def __init__(self, num_ranks: int) -> None:
        self.shape = SimpleNamespace(global_batch_size=1, num_ranks=num_ranks)

    def plan(self, step: int) -> list[tuple[int, int]]:
        return [(step, os.getpid())]

    def execute(self, plan: tuple[int, int]):
        return Pack(plan[1]), Counter()


@pytest.mark.parametrize("num_ranks, planners", [(31, 1), (32, 2), (1000, 3)])
def test_several_steps_of_many_ranks_are_planned_at_a_time_and_come_in_order(num_ranks, planners):
    """Claim: planning keeps up where a step of many ranks takes less time than its plan, which is of all ranks; of few
    ranks, one process plans, whose table of sizes is whole."""
    packs = packs_from(ShowingPlanner(num_ranks), 0, num_workers=3)
    made = [next(packs) for _ in range(6)]
    packs.close()
    assert [step for (step, _), _, _ in made] == list(range(6))
    pids = [pack.pid for _, pack, _ in made]
    assert len({*pids}) == planners and pids[planners:] == pids[:-planners]
