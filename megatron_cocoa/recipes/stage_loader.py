"""The loader of a stage on this rank."""

from __future__ import annotations

from functools import partial

from megatron_cocoa.data.loader import StageLoader
from megatron_cocoa.data.replica import ReplicaLoader
from megatron_cocoa.data.stages import stage_data
from megatron_cocoa.parallel import topology
from megatron_cocoa.parallel.host import once_per_host
from megatron_cocoa.parallel.replica import ReplicaLink
from megatron_cocoa.recipes.context import RunContext


def build_loader(context: RunContext, stage: str) -> StageLoader | ReplicaLoader:
    """The loader of a stage for this rank; with model parallelism one rank of each replica reads for the others.

    Rows are read by one rank of each host. Every rank calls it, for the stages in the same order. Raises as
    ``StageLoader``, and what is wrong with the rows of any host on every rank.
    """
    parallel = context.settings.parallel
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    link = ReplicaLink() if parallel.model_parallel_size > 1 else None
    data = once_per_host(lambda: stage_data(stage, context.settings), is_wanted=link is None or link.is_reader)

    def make_reader(*, defers_all: bool = False) -> StageLoader:
        return StageLoader(
            stage,
            context.settings,
            bundle=context.bundle,
            architecture=context.architecture,
            data_parallel_rank=topology.data_parallel_rank(),
            data_parallel_size=topology.data_parallel_size(),
            pad_to_multiple_of=context.pad_to_multiple_of,
            packs_multiple_of=parallel.pipeline_model_parallel_size if interleaved else 1,
            defers_all=defers_all,
            data=data,
        )

    if link is None:
        return make_reader()
    return ReplicaLoader(
        partial(make_reader, defers_all=True),
        link,
        needs_pixels=topology.is_pipeline_first_stage(),
        needs_unit_targets=topology.is_pipeline_last_stage(),
        ahead=context.settings.data.num_workers > 0,
    )
