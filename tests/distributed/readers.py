"""Checks of the hand-over inside a replica: every rank gets what it would have read itself, and one rank decodes."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_cocoa.config import STAGES, ParallelSettings
from megatron_cocoa.data import stages
from megatron_cocoa.data.loader import StageLoader
from megatron_cocoa.parallel import topology
from megatron_cocoa.recipes.context import RunContext, prepare_context
from megatron_cocoa.recipes.stage_loader import build_loader
from tests.distributed.check import Check, degrees
from tests.distributed.tiny_run import tiny_settings, write_folders

STEPS = 4


def _context(folder: Path, parallel: ParallelSettings, workers: int) -> RunContext:
    write_folders(folder)
    settings = tiny_settings(folder, parallel=parallel)
    return prepare_context(replace(settings, data=replace(settings.data, num_workers=workers)))


def _own_reader(context: RunContext, stage: str) -> StageLoader:
    return StageLoader(
        stage,
        context.settings,
        bundle=context.bundle,
        architecture=context.architecture,
        data_parallel_rank=topology.data_parallel_rank(),
        data_parallel_size=topology.data_parallel_size(),
        needs_pixels=topology.is_pipeline_first_stage(),
        needs_unit_targets=topology.is_pipeline_last_stage(),
        pad_to_multiple_of=context.pad_to_multiple_of,
    )


def _different_fields(a, b) -> list[str]:
    def same(x, y) -> bool:
        return torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y

    a, b = a.materialized(), b.materialized()
    return [name for name, value in vars(a).items() if not same(value, getattr(b, name))]


def one_reader(workers: int, **parallel) -> dict:
    """Fields that differ from what this rank would have read itself, over all ranks, and pictures decoded."""
    settings = ParallelSettings(**parallel)
    topology.set_layout(settings, seed=0)
    differing, decoded, resumed = [], 0, []
    with tempfile.TemporaryDirectory() as folder:
        context = _context(Path(folder), settings, workers)
        for stage in STAGES:
            own, shared = _own_reader(context, stage), build_loader(context, stage)
            for _ in range(STEPS):
                expected, found = own.next_step(), shared.next_step()
                assert len(expected) == len(found) and own.plan_digest() == shared.plan_digest() > 0
                differing += [name for a, b in zip(expected, found) for name in _different_fields(a, b)]
            assert own.state_dict() == shared.state_dict()
            state = shared.state_dict()
            after = [own.next_step(), shared.next_step()]
            shared.load_state_dict(state)
            again = shared.next_step()
            resumed += [name for batches in after for a, b in zip(batches, again) for name in _different_fields(a, b)]
            reader = getattr(shared, "_reader", shared)
            decoded += 0 if reader is None else int(reader.statistics()["decoded"])
            own.close()
            shared.close()
        dist.barrier()
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {"differing": differing + resumed, "decoded": decoded})
    return {
        "differing": sorted({name for found in gathered for name in found["differing"]}),
        "decoded": [found["decoded"] for found in gathered],
    }


def rows_read(**parallel) -> dict:
    """How often each rank has read rows, what each says of them, and whether they lie in memory that is shared."""
    settings = ParallelSettings(**parallel)
    topology.set_layout(settings, seed=0)
    with tempfile.TemporaryDirectory() as folder, patch.object(stages, "stage_rows", wraps=stages.stage_rows) as read:
        context = _context(Path(folder), settings, 0)
        loaders = [build_loader(context, stage) for stage in STAGES]
        found = {
            "read": read.call_count,
            "states": [loader.state_dict() for loader in loaders],
            "mapped": sum("memfd:once_per_host" in line for line in Path("/proc/self/maps").open()),
        }
        dist.barrier()
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    return {name: [found[name] for found in gathered] for name in found}


def an_error_reaches_all(**parallel) -> dict:
    """What each rank says where the data is missing at the start, and where it goes missing during the run."""
    settings = ParallelSettings(**parallel)
    topology.set_layout(settings, seed=0)
    said: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        context = _context(Path(folder), settings, 0)
        loader = build_loader(context, "warmup")
        loader.next_step()
        for picture in (Path(folder) / "pairs" / "images").iterdir():
            picture.unlink()
        (Path(folder) / "pairs" / "bridge.jsonl").unlink()
        dist.barrier()
        for call in (lambda: [loader.next_step() for _ in range(20)], lambda: build_loader(context, "bridge")):
            try:
                call()
            except ValueError as error:
                said.append(str(error))
        loader.close()
        dist.barrier()
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, said)
    return {"said": gathered}


LAYOUTS: dict[str, tuple[int, int, dict]] = {
    "reader-tp2": (2, 0, degrees(tp=2, sequence_parallel=True)),
    "reader-pp2": (2, 1, degrees(pp=2)),
    "reader-cp2": (2, 0, degrees(cp=2)),
    "reader-tp2-pp2": (4, 1, degrees(tp=2, pp=2)),
    "reader-tp2-dp2": (4, 0, degrees(tp=2)),
    "reader-dp2": (2, 1, degrees()),
}

ERRORS: dict[str, tuple[int, dict]] = {
    "reader-error-pp2": (2, degrees(pp=2)),
    "reader-error-dp2": (2, degrees()),
    "reader-error-tp2-cp2": (4, degrees(tp=2, cp=2)),
}

SHARED: dict[str, tuple[dict, list[int]]] = {
    "rows-dp4": (degrees(), [0, 1, 2, 3]),
    "rows-pp2-dp2": (degrees(pp=2), [0, 1]),
}
"""With four ranks: the degrees, and the ranks that read for their replica."""

CHECKS = {
    **{
        name: Check(size, functools.partial(one_reader, workers, **degrees))
        for name, (size, workers, degrees) in LAYOUTS.items()
    },
    **{
        name: Check(size, functools.partial(an_error_reaches_all, **degrees))
        for name, (size, degrees) in ERRORS.items()
    },
    **{name: Check(4, functools.partial(rows_read, **degrees)) for name, (degrees, _) in SHARED.items()},
}
