"""A layout for a stage on a number of GPUs: the cheapest by rules of thumb whose computed memory fits.

The rules order candidates; they are no measurement. Recompute repeats a share of the forward pass, tensor
parallelism pays for its exchanges, a pipeline idles while it fills, small packs leave a GPU waiting for launches, and
gradient caching (more than one micro-batch in stage ``contrastive``) runs forward twice. Memory is computed as in
``memory.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.config import ParallelSettings, RecomputeSettings, TrainSettings
from megatron_cocoa.model.flops import step_flops
from megatron_cocoa.model.layout_checks import check_layout
from megatron_cocoa.model.schedule import microbatches_ahead
from megatron_cocoa.model.workload import Workload
from megatron_cocoa.planning.memory import HEADROOM, RankMemory, stage_memory
from megatron_cocoa.planning.packs import PackShape, expected_microbatches, expected_pack

GPUS_PER_NODE = 8
TENSOR_SIZES, PIPELINE_SIZES = (1, 2, 4, 8), (1, 2, 4, 8, 16)
RECOMPUTE_COST = {"none": 0.0, "selective": 0.02, "full": 0.27}
"""Share of a step that recomputing the language model adds; the tower's is taken at a quarter of it."""


@dataclass(frozen=True)
class Suggestion:
    """A stage's layout: settings that differ from the given ones, and its memory by pipeline stage."""

    settings: TrainSettings
    stage: str
    world_size: int
    memory: tuple[RankMemory, ...]

    @property
    def worst(self) -> RankMemory:
        return max(self.memory, key=lambda rank: rank.total)

    @property
    def data_parallel_size(self) -> int:
        return self.settings.parallel.data_parallel_size(self.world_size)

    @property
    def micro_batch_size(self) -> int:
        return self.settings.stage(self.stage).samples_per_microbatch(self.data_parallel_size)


def fits(memory: list[RankMemory] | tuple[RankMemory, ...], gpu_bytes: float) -> bool:
    """Whether the fullest rank leaves ``HEADROOM`` of a GPU free."""
    return max(rank.total for rank in memory) <= (1 - HEADROOM) * gpu_bytes


def suggest(
    architecture: QwenVLArchitecture, settings: TrainSettings, stage: str, *, world_size: int, gpu_bytes: float
) -> Suggestion | None:
    """The cheapest layout that fits, or None where none does.

    Degrees, recompute and the micro-batch size are chosen; batch size, picture size, precision and frozen parts are
    those of ``settings``.

    Args:
        world_size: GPUs, in nodes of eight that tensor parallelism does not leave.
        gpu_bytes: memory of one.
    """
    candidates = []
    for parallel in _layouts(architecture, settings, world_size):
        for changed in _variants(settings, parallel, stage, world_size):
            replicas = parallel.data_parallel_size(world_size)
            pack = expected_pack(architecture, changed, stage, data_parallel_size=replicas)
            candidates.append((_cost(architecture, changed, stage, pack, replicas), len(candidates), changed, pack))
    for _, _, changed, pack in sorted(candidates, key=lambda candidate: candidate[:2]):
        if changed.parallel.pipeline_model_parallel_size > 1:
            changed = _balanced(architecture, changed, pack)
            if changed is None:
                continue
        memory = stage_memory(architecture, changed, stage, world_size=world_size, pack=pack)
        if fits(memory, gpu_bytes):
            return Suggestion(changed, stage, world_size, tuple(memory))
    return None


def _layouts(architecture: QwenVLArchitecture, settings: TrainSettings, world_size: int) -> Iterator[ParallelSettings]:
    """Degrees that divide heads, widths and GPUs; pipelines are cut later."""
    for tensor in TENSOR_SIZES:
        for pipeline in PIPELINE_SIZES:
            if tensor > min(GPUS_PER_NODE, world_size) or world_size % (tensor * pipeline):
                continue
            parallel = replace(
                settings.parallel,
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                virtual_pipeline_model_parallel_size=None,
                context_parallel_size=1,
                sequence_parallel=tensor > 1,
                use_distributed_optimizer=True,
                num_layers_in_first_pipeline_stage=_any_first(architecture.text.num_hidden_layers, pipeline),
                num_layers_in_last_pipeline_stage=None,
            )
            model = replace(settings.model, vision_ffn_multiple=max(128, settings.model.vision_ffn_multiple))
            try:
                check_layout(architecture, model=model, parallel=parallel)
            except ValueError:
                continue
            yield parallel


def _any_first(layers: int, pipeline: int) -> int | None:
    """Layers on the first stage such that the others divide the rest evenly."""
    return None if pipeline == 1 else layers - (layers - 1) // (pipeline - 1) * (pipeline - 1)


def _variants(
    settings: TrainSettings, parallel: ParallelSettings, stage: str, world_size: int
) -> Iterator[TrainSettings]:
    """Micro-batch sizes that divide a rank's share, and recompute modes."""
    values, replicas = settings.stage(stage), parallel.data_parallel_size(world_size)
    if values.global_batch_size % replicas:
        return
    share = values.global_batch_size // replicas
    is_padded = parallel.tensor_model_parallel_size > 1 or settings.model.fp8_vision
    multiple = 128 if is_padded else settings.model.vision_ffn_multiple
    model = replace(settings.model, vision_ffn_multiple=max(multiple, settings.model.vision_ffn_multiple))
    for size in (1, 2, 4, 8, 16, 32):
        if share % size:
            continue
        for language in ("none", "selective", "full"):
            for vision in ("none", "full"):
                yield replace(
                    settings,
                    model=model,
                    parallel=parallel,
                    recompute=RecomputeSettings(vision=vision, language=language),
                    **{stage: replace(values, micro_batch_size=size)},
                )


def _cost(
    architecture: QwenVLArchitecture, settings: TrainSettings, stage: str, pack: PackShape, replicas: int
) -> float:
    """Relative time of a step."""
    parallel, recompute = settings.parallel, settings.recompute
    number = expected_microbatches(architecture, settings, stage, data_parallel_size=replicas)
    repeated = RECOMPUTE_COST[recompute.language] + RECOMPUTE_COST[recompute.vision] / 4
    ahead = microbatches_ahead(number, num_chunks=parallel.num_chunks) if stage == "contrastive" else 0
    caching = 0.3 * ahead / number
    exchange = 1 + 0.06 * math.log2(parallel.tensor_model_parallel_size)
    bubble = 1 + (parallel.pipeline_model_parallel_size - 1) / number
    launches = 1 + 500 * parallel.tensor_model_parallel_size / pack.tokens
    return (1 + repeated + caching) * exchange * bubble * launches


def _balanced(architecture: QwenVLArchitecture, settings: TrainSettings, pack: PackShape) -> TrainSettings | None:
    """``settings`` with as many layers on the first stage as leave room for the tower's work; None where none can."""
    layers, pipeline = architecture.text.num_hidden_layers, settings.parallel.pipeline_model_parallel_size
    workload = Workload(tokens=pack.tokens, patches=pack.patches, read_rows=pack.tokens)
    parts = {part.name: part.linear for part in step_flops(architecture, workload).parts}
    tower = (parts["vision_layers"] + parts["merger"]) / (parts["language_layers"] / layers)
    wanted = (layers + tower) / pipeline - tower
    possible = [first for first in range(1, layers) if (layers - first) % (pipeline - 1) == 0]
    if not possible:
        return None
    first = min(possible, key=lambda number: abs(number - wanted))
    return replace(settings, parallel=replace(settings.parallel, num_layers_in_first_pipeline_stage=first))
