"""Whether a parallel layout fits an architecture, and how it divides the language model's layers.

Every relation between architecture and parallel degrees is checked here, before a layer is built, so that an
impossible layout ends in one message with its numbers.
"""

from __future__ import annotations

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.config import ModelSettings, ParallelSettings, RecomputeSettings
from megatron_cocoa.model.attention import check_head_split
from megatron_cocoa.model.fp8 import check_fp8_widths


def check_layout(
    architecture: QwenVLArchitecture,
    *,
    model: ModelSettings,
    parallel: ParallelSettings,
    recompute: RecomputeSettings = RecomputeSettings(),
) -> None:
    """Refuse degrees, and blocks of recomputed layers, that the architecture cannot be divided by.

    Raises:
        ValueError: naming the number that does not divide and what to change.
    """
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    text, vision = architecture.text, architecture.vision
    check_head_split(
        num_attention_heads=text.num_attention_heads, tensor_parallel=tp, context_parallel=cp, name="language model"
    )
    check_head_split(num_attention_heads=vision.num_heads, tensor_parallel=tp, context_parallel=1, name="tower")
    if max(tp, text.num_key_value_heads) % min(tp, text.num_key_value_heads):
        raise ValueError(
            f"tensor parallel size {tp} is neither a divisor nor a multiple of num_key_value_heads "
            f"{text.num_key_value_heads}: choose one that is"
        )
    _check_divides(text.intermediate_size, tp, "intermediate_size of the language model")
    ffn = padded_vision_ffn(architecture, model.vision_ffn_multiple)
    _check_divides(ffn, tp, "ffn width of the tower", "set model.vision_ffn_multiple (128 serves the published sizes)")
    _check_divides(text.hidden_size, tp, "hidden_size of the language model")
    check_fp8_widths(architecture, model, ffn=ffn, tensor_parallel=tp)
    _check_pipeline(text.num_hidden_layers, pp, parallel)
    _check_recompute(architecture, parallel, recompute)


def _check_recompute(
    architecture: QwenVLArchitecture, parallel: ParallelSettings, recompute: RecomputeSettings
) -> None:
    """Blocks must come out even: Megatron looks for the layers that are not there."""
    layers = architecture.text.num_hidden_layers
    chunks = {n // parallel.num_chunks for n in layers_per_stage(layers, parallel)}
    for name, counts in (("vision", {architecture.vision.depth}), ("language", chunks)):
        number = getattr(recompute, f"{name}_num_layers") or 1
        uneven = [n for n in sorted(counts) if n % number]
        if getattr(recompute, name) == "full" and uneven:
            raise ValueError(
                f"recompute.{name}_num_layers {number} does not divide the {uneven[0]} {name} layers of a pipeline "
                f"stage (or virtual chunk), which are recomputed in blocks of that many: choose a divisor, such as 1"
            )


def _check_divides(number: int, tp: int, name: str, remedy: str = "choose another tensor parallel size") -> None:
    if number % tp:
        raise ValueError(f"{name}, {number}, is not divisible by tensor parallel size {tp}: {remedy}")


def _check_pipeline(layers: int, pp: int, parallel: ParallelSettings) -> None:
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    if pp == 1 and (first is not None or last is not None):
        raise ValueError(
            "num_layers_in_first/last_pipeline_stage need a pipeline of at least two stages: set them to null, or "
            "parallel.pipeline_model_parallel_size to 2 or more"
        )
    fixed = [n for n in (first, last) if n is not None]
    remaining, stages = layers - sum(fixed), pp - len(fixed)
    remedy = (
        "change parallel.pipeline_model_parallel_size or parallel.num_layers_in_first_pipeline_stage and "
        "parallel.num_layers_in_last_pipeline_stage"
    )
    if remaining < 0 or (stages == 0 and remaining) or (stages and remaining % stages):
        raise ValueError(
            f"{layers} language layers cannot be split: {fixed or 'none'} fixed for the first/last stage leave "
            f"{remaining} layers for {stages} of {pp} pipeline stages; {remedy}"
        )
    if stages and not remaining:
        raise ValueError(
            f"{layers} language layers leave {stages} of {pp} pipeline stages without a layer: {fixed or 'none'} fixed "
            f"for the first/last stage; {remedy}"
        )
    chunks = parallel.virtual_pipeline_model_parallel_size
    per_stage = layers_per_stage(layers, parallel)
    if chunks and any(n % chunks for n in per_stage):
        raise ValueError(
            f"{per_stage} layers per stage are not divisible by {chunks} virtual stages: change "
            f"parallel.virtual_pipeline_model_parallel_size or the layers of the first and last stage"
        )


def layers_per_stage(layers: int, parallel: ParallelSettings) -> list[int]:
    """Language layers of the first and last pipeline stage, where they are set, and last of each other one."""
    ends = (parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage)
    fixed = [n for n in ends if n is not None]
    stages = parallel.pipeline_model_parallel_size - len(fixed)
    return [*fixed, (layers - sum(fixed)) // stages] if stages else fixed


def padded_vision_ffn(architecture: QwenVLArchitecture, multiple: int) -> int:
    """Width of the tower's ffn after zero padding to a multiple."""
    return -(-architecture.vision.intermediate_size // multiple) * multiple
