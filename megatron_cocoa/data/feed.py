"""Packs in their order, made in this process or ahead of time by worker processes.

The workers are those of torch's ``DataLoader``; the order is ours. Some of them plan, each a whole step, the others
decode and pack, each a whole pack, and what they make arrives in the order of the plan through shared memory. Since a
plan depends on its position alone, there is no state in a worker that a checkpoint would have to hold.
"""

from __future__ import annotations

import gc
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, replace
from itertools import count

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_cocoa.batch import PackedBatch
from megatron_cocoa.data.step_plan import PackPlan, StepPlanner
from megatron_cocoa.parallel.stop_signals import outlive_stop_signals

Made = tuple[PackPlan, PackedBatch, Counter]

_RANKS_A_PLANNER = 32
"""Data-parallel ranks whose steps one process can plan: 0.3 ms a pair, however many ranks share its 0.1 to 0.2 seconds
of a GPU's time (a 7B). Each planner keeps its own table of sizes, so that more than it takes read headers again."""


@dataclass(frozen=True)
class _Failure:
    """A ``ValueError`` of a worker: only its message crosses the border between processes."""

    message: str


class _Plans(Dataset):
    def __init__(self, planner: StepPlanner) -> None:
        self.planner = planner

    def __getitem__(self, step: int) -> list[PackPlan] | _Failure:
        try:
            return self.planner.plan(step)
        except ValueError as error:
            return _Failure(str(error))


class _Packs(Dataset):
    def __init__(self, planner: StepPlanner) -> None:
        self.planner = planner

    def __getitem__(self, plan: PackPlan | _Failure) -> Made | _Failure:
        if isinstance(plan, _Failure):
            return plan
        try:
            batch, counts = self.planner.execute(plan)
            return plan, _integers_as_arrays(batch), counts
        except ValueError as error:
            return _Failure(str(error))


def packs_from(planner: StepPlanner, start: int, *, num_workers: int) -> Iterator[Made]:
    """This rank's packs, endlessly, from the step at position ``start`` on.

    Args:
        planner: of the stage.
        start: a multiple of the global batch size.
        num_workers: processes that decode and pack, beside up to as many that plan; 0 does all here, when asked.

    Raises:
        ValueError: from ``next``, in the place of the pack that could not be made.
    """
    steps = count(start, planner.shape.global_batch_size)
    if num_workers == 0:
        return ((plan, *planner.execute(plan)) for step in steps for plan in planner.plan(step))
    return _from_workers(planner, steps, num_workers)


def _from_workers(planner: StepPlanner, steps: Iterator[int], num_workers: int) -> Iterator[Made]:
    # Forked workers share the rows, which may be gigabytes, and the caches of tokens.
    shared = dict(batch_size=None, collate_fn=_as_it_is, multiprocessing_context="fork", worker_init_fn=_begin_worker)
    # A plan is of all ranks: more of them make the step shorter and its plan no smaller, 5 seconds for 16,384 pairs.
    num_planners = min(num_workers, 1 + planner.shape.num_ranks // _RANKS_A_PLANNER)
    plans = _made_by(DataLoader(_Plans(planner), sampler=steps, num_workers=num_planners, **shared))
    packs = _made_by(DataLoader(_Packs(planner), sampler=_each(plans), num_workers=num_workers, **shared))
    with lost_workers_explained(), closing(plans), closing(packs):
        for made in packs:
            if isinstance(made, _Failure):
                raise ValueError(made.message)
            plan, batch, counts = made
            yield plan, _arrays_as_tensors(batch), counts


def _made_by(workers: DataLoader) -> Iterator:
    """What they make. They end with this generator."""
    iterator = iter(workers)
    try:
        yield from iterator
    except (ConnectionError, EOFError) as error:
        # One that a worker itself came upon is told by torch, with the worker's traceback, and no worker is lost.
        if str(error).startswith("Caught "):
            raise
        # A worker itself hands over the memory of its tensors, and torch may not have heard of its death yet.
        raise RuntimeError(f"DataLoader worker hung up: {error!r}") from error
    finally:
        # The iterator's own end, which an error whose traceback holds it puts off, may come too late: the end of the
        # process sends them a signal that they are deaf to, and waits for them.
        iterator._shutdown_workers()


@contextmanager
def lost_workers_explained() -> Iterator[None]:
    """Say what a worker's death means, which torch reports in the main thread wherever that is, not in ``next`` alone.

    Raises:
        ValueError: in the place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        found = str(error).strip().rstrip(".")
        # It may hold an iterator that ``_made_by`` never got, and from Python 3.12 on contextlib makes a cycle of the
        # two. The collector may never come, or close the queue by which workers are asked to end before it asks them.
        error.__traceback__ = None
        raise ValueError(
            f"a process that reads data on host {socket.gethostname()} was lost: {found}. The kernel ends one where a "
            f"host runs out of memory: give it more, or set data.num_workers lower, and go on from the last checkpoint"
        ) from None


def _begin_worker(worker: int) -> None:
    """A worker that is gone would end its rank before the last checkpoint; it ends when asked, or with the rank."""
    outlive_stop_signals()
    # What the rank has left for the collector may hold memory of its GPU, which nobody can give back here: that ends
    # the worker with an error of CUDA. And to look through all that the rank has copies the pages that it lies in.
    gc.freeze()


def _as_it_is(value: object) -> object:
    # Torch's own conversion would add a Counter to itself.
    return value


def _integers_as_arrays(batch: PackedBatch) -> PackedBatch:
    """Indices travel by value: torch would hold a file descriptor open for each tensor as long as that lives."""
    found = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(
        batch,
        **{
            name: value.numpy()
            for name, value in found.items()
            if isinstance(value, torch.Tensor) and not value.is_floating_point()
        },
    )


def _arrays_as_tensors(batch: PackedBatch) -> PackedBatch:
    found = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(
        batch, **{name: torch.from_numpy(value) for name, value in found.items() if isinstance(value, np.ndarray)}
    )


def _each(plans: Iterator[list[PackPlan] | _Failure]) -> Iterator[PackPlan | _Failure]:
    for planned in plans:
        if isinstance(planned, _Failure):
            yield planned
            return
        yield from planned
