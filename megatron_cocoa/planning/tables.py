"""What ``tools/plan_layout.py`` prints: one run's memory and a suggestion, or the tables of docs/layouts.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.config import STAGES, TrainSettings
from megatron_cocoa.model.layout_checks import check_layout
from megatron_cocoa.planning.memory import HEADROOM, RankMemory, stage_memory
from megatron_cocoa.planning.packs import expected_microbatches, expected_pack
from megatron_cocoa.planning.published import published_architecture
from megatron_cocoa.planning.suggest import Suggestion, fits, suggest

TABLE_SIZES = ("qwen2-vl-2b", "qwen2.5-vl-3b", "qwen2.5-vl-7b", "qwen2.5-vl-32b", "qwen2.5-vl-72b")
TABLE_GPUS = (8, 16, 32, 64, 128, 256, 512)
PRESET_GPUS = {
    "qwen2-vl-2b": 8, "qwen2-vl-7b": 8, "qwen2-vl-72b": 32,
    "qwen2.5-vl-3b": 8, "qwen2.5-vl-7b": 8, "qwen2.5-vl-32b": 16, "qwen2.5-vl-72b": 32,
}  # fmt: skip
"""GPUs that each preset's comment names."""

GIB = 2**30
SettingsOf = Callable[[str], TrainSettings]
"""The settings of a preset by name."""


def describe(suggestion: Suggestion | None) -> str:
    """A layout in a table's cell: degrees, micro-batch, recompute, memory of the fullest rank."""
    if suggestion is None:
        return "none fits"
    parallel, recompute = suggestion.settings.parallel, suggestion.settings.recompute
    degrees = f"TP{parallel.tensor_model_parallel_size}"
    if parallel.pipeline_model_parallel_size > 1:
        first = parallel.num_layers_in_first_pipeline_stage
        degrees += f" PP{parallel.pipeline_model_parallel_size} (first {first})"
    degrees += f" DP{suggestion.data_parallel_size}"
    modes = f"{recompute.vision}/{recompute.language}"
    return f"{degrees}, mb {suggestion.micro_batch_size}, {modes}: {suggestion.worst.total / GIB:.0f} GiB"


def suggestion_tables(settings_of: SettingsOf, *, gpu_bytes: float) -> Iterator[str]:
    """Markdown lines: one table a size, a row for each number of GPUs, a column for each stage."""
    for name in TABLE_SIZES:
        architecture, settings = published_architecture(name), settings_of(name)
        yield f"### {name}"
        yield ""
        yield "| GPUs | " + " | ".join(f"`{stage}`" for stage in STAGES) + " |"
        yield "| --- " * (1 + len(STAGES)) + "|"
        for gpus in TABLE_GPUS:
            cells = [
                describe(suggest(architecture, settings, stage, world_size=gpus, gpu_bytes=gpu_bytes))
                for stage in STAGES
            ]
            yield f"| {gpus} | " + " | ".join(cells) + " |"
        yield ""


def preset_memory(name: str, settings: TrainSettings, stage: str, world_size: int) -> list[RankMemory]:
    """Memory of a preset's own layout, by pipeline stage."""
    architecture = published_architecture(name)
    replicas = settings.parallel.data_parallel_size(world_size)
    pack = expected_pack(architecture, settings, stage, data_parallel_size=replicas)
    return stage_memory(architecture, settings, stage, world_size=world_size, pack=pack)


def preset_table(settings_of: SettingsOf) -> Iterator[str]:
    """Markdown lines: each preset's own layout on the GPUs that it is written for, the fullest rank of each stage."""
    yield "| Preset | GPUs | " + " | ".join(f"`{stage}`" for stage in STAGES) + " |"
    yield "| --- " * (2 + len(STAGES)) + "|"
    for name, gpus in PRESET_GPUS.items():
        cells = []
        for stage in STAGES:
            worst = max(preset_memory(name, settings_of(name), stage, gpus), key=lambda rank: rank.total)
            parts = [worst.persistent, worst.activations + worst.transient, worst.total]
            cells.append("{:.0f} + {:.0f} = {:.0f} GiB".format(*(part / GIB for part in parts)))
        yield f"| `{name}` | {gpus} | " + " | ".join(cells) + " |"


def plan_lines(
    architecture: QwenVLArchitecture, settings: TrainSettings, stage: str, *, world_size: int, gpu_bytes: float
) -> tuple[list[str], bool]:
    """What a person reads of one stage: the given layout's memory, and the suggested layout as options.

    Returns:
        The lines, and whether the given layout fits.

    Raises:
        ValueError: for a layout that architecture, GPUs or batch sizes cannot be divided by.
    """
    check_layout(architecture, model=settings.model, parallel=settings.parallel, recompute=settings.recompute)
    replicas = settings.parallel.data_parallel_size(world_size)
    pack = expected_pack(architecture, settings, stage, data_parallel_size=replicas)
    memory = stage_memory(architecture, settings, stage, world_size=world_size, pack=pack)
    is_fine = fits(memory, gpu_bytes)
    number = expected_microbatches(architecture, settings, stage, data_parallel_size=replicas)
    lines = [
        f"stage {stage}: {replicas} replica(s), packs of {pack.tokens} tokens and {pack.patches} patches, "
        f"{number} micro-batch(es)"
    ]
    for rank in memory:
        parts = (rank.parameters, rank.gradients, rank.optimizer, rank.activations, rank.transient, rank.total)
        lines.append(
            "  pipeline stage {}: parameters {:.1f} + gradients {:.1f} + optimizer {:.1f} + activations {:.1f} + "
            "transient {:.1f} = {:.1f} GiB".format(rank.pipeline_rank, *(part / GIB for part in parts))
        )
    room = (1 - HEADROOM) * gpu_bytes / GIB
    lines.append(f"  {'fits' if is_fine else 'does not fit'}: {room:.1f} GiB of each GPU are planned with")
    found = suggest(architecture, settings, stage, world_size=world_size, gpu_bytes=gpu_bytes)
    lines.append(f"  suggested: {describe(found)}")
    if found is not None:
        lines.append("    " + " ".join(as_options(found, settings)))
    return lines, is_fine


def as_options(suggestion: Suggestion, given: TrainSettings) -> list[str]:
    """A suggestion as command-line options to add to those of ``given``, which it was made for.

    What ``given`` sets otherwise is taken back: a preset's first pipeline stage would be refused without a pipeline.
    """
    settings = suggestion.settings
    parallel, recompute = settings.parallel, settings.recompute
    values = {
        "parallel.tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "parallel.pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "parallel.sequence_parallel": parallel.sequence_parallel,
        "parallel.use_distributed_optimizer": True,
        "recompute.vision": recompute.vision,
        "recompute.language": recompute.language,
        f"{suggestion.stage}.micro_batch_size": suggestion.micro_batch_size,
        "model.vision_ffn_multiple": settings.model.vision_ffn_multiple,
    }
    if parallel.num_layers_in_first_pipeline_stage is not None:
        values["parallel.num_layers_in_first_pipeline_stage"] = parallel.num_layers_in_first_pipeline_stage
    for group in ("parallel", "recompute"):
        new, old = getattr(settings, group), getattr(given, group)
        for name in (field.name for field in fields(new)):
            if getattr(new, name) != getattr(old, name):
                values[f"{group}.{name}"] = getattr(new, name)
    return [f"--{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def document_tables(settings_of: SettingsOf, *, gpu_bytes: float) -> Iterator[str]:
    """Every line between the markers of docs/layouts.md."""
    yield "## Presets"
    yield ""
    yield from preset_table(settings_of)
    yield ""
    yield "## Suggestions"
    yield ""
    yield from suggestion_tables(settings_of, gpu_bytes=gpu_bytes)
