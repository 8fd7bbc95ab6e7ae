"""Layouts and batches that would not work, or would corrupt a run in silence, end in a message with the numbers."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.batch import MaskKind
from megatron_cocoa.config import ModelSettings, ParallelSettings, RecomputeSettings, TrainSettings
from megatron_cocoa.model.attention import SequenceContext
from megatron_cocoa.model.build import check_model
from megatron_cocoa.model.heads import local_rows
from megatron_cocoa.model.layout_checks import check_layout
from megatron_cocoa.model.segments import SegmentTable
from megatron_cocoa.model.specs import resolve_implementation
from tests.parity import reference

ARCHITECTURE = QwenVLArchitecture.from_huggingface(reference.tiny_config("qwen2_5_vl"))


@pytest.mark.parametrize(
    "text, vision, parallel, message",
    [
        ({}, {}, dict(tensor_model_parallel_size=3), "8 attention heads of the language model .* 3 x .* 1 = 3"),
        (
            {},
            {},
            dict(tensor_model_parallel_size=4, context_parallel_size=4),
            "8 attention heads of the language model .* tensor parallel size 4 x context parallel size 4 = 16",
        ),
        ({}, dict(num_heads=2), dict(tensor_model_parallel_size=4), "2 attention heads of the tower .* 4 x .* 1 = 4"),
        (
            dict(num_attention_heads=24, num_key_value_heads=6),
            dict(num_heads=4),
            dict(tensor_model_parallel_size=4),
            "tensor parallel size 4 is neither a divisor nor a multiple of num_key_value_heads 6: choose one that is",
        ),
        (
            dict(num_attention_heads=24, num_key_value_heads=3),
            {},
            dict(tensor_model_parallel_size=4),
            "tensor parallel size 4 is neither a divisor nor a multiple of num_key_value_heads 3",
        ),
        (dict(intermediate_size=90), {}, dict(tensor_model_parallel_size=4), "intermediate_size .*, 90, .* size 4"),
        (
            {},
            dict(intermediate_size=46),
            dict(tensor_model_parallel_size=4),
            "ffn width of the tower, 46, .* 4: set model.vision_ffn_multiple",
        ),
        ({}, {}, dict(pipeline_model_parallel_size=3), "4 language layers .* 4 layers for 3 of 3 pipeline stages"),
        (
            {},
            {},
            dict(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=5),
            r"4 language layers cannot be split: \[5\] fixed .* leave -1 layers",
        ),
        (
            {},
            {},
            dict(
                pipeline_model_parallel_size=2,
                num_layers_in_first_pipeline_stage=1,
                num_layers_in_last_pipeline_stage=2,
            ),
            r"\[1, 2\] fixed for the first/last stage leave 1 layers for 0 of 2",
        ),
        (
            {},
            {},
            dict(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=4),
            r"4 language layers leave 1 of 2 pipeline stages without a layer: \[4\] fixed .* "
            "change parallel.pipeline_model_parallel_size or parallel.num_layers_in_first_pipeline_stage",
        ),
        (
            {},
            {},
            dict(num_layers_in_last_pipeline_stage=2),
            "num_layers_in_first/last_pipeline_stage need a pipeline of at least two stages: set them to null",
        ),
        (
            {},
            {},
            dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=4),
            r"\[2\] layers per stage are not divisible by 4 virtual stages: change parallel.virtual_pipeline",
        ),
    ],
)
def test_impossible_layouts_are_refused_with_their_numbers(text, vision, parallel, message):
    """Claim: a degree that the architecture forbids is one message before any layer is built."""
    architecture = replace(
        ARCHITECTURE, text=replace(ARCHITECTURE.text, **text), vision=replace(ARCHITECTURE.vision, **vision)
    )
    with pytest.raises(ValueError, match=message):
        check_layout(architecture, model=ModelSettings(), parallel=ParallelSettings(**parallel))


@pytest.mark.parametrize(
    "parallel",
    [
        dict(tensor_model_parallel_size=4, context_parallel_size=2),
        dict(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=1),
        dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        dict(pipeline_model_parallel_size=4),
    ],
)
def test_possible_layouts_pass(parallel):
    """Claim: the checks refuse nothing that the parity suite runs."""
    check_layout(ARCHITECTURE, model=ModelSettings(), parallel=ParallelSettings(**parallel))


def test_padding_makes_the_published_tower_width_divisible():
    """Claim: the remedy that the message names works: 3420 at tensor parallel 8 after padding to 3456."""
    vision = replace(ARCHITECTURE.vision, intermediate_size=3420, num_heads=16)
    architecture = replace(ARCHITECTURE, vision=vision)
    parallel = ParallelSettings(tensor_model_parallel_size=8)
    with pytest.raises(ValueError, match="3420, is not divisible by tensor parallel size 8"):
        check_layout(architecture, model=ModelSettings(), parallel=parallel)
    check_layout(architecture, model=ModelSettings(vision_ffn_multiple=128), parallel=parallel)


def test_missing_transformer_engine_is_told_with_the_command_that_installs_it(monkeypatch):
    """Claim: the command is one that works: the project is on no index, and the package builds against torch."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-build-isolation -e '\.\[te\]'.*; choose local"):
        resolve_implementation(ModelSettings(transformer_impl="transformer_engine"))


class _Group:
    def __init__(self, rank: int, size: int):
        self.rank, self.size = lambda: rank, lambda: size


def test_packs_that_context_parallelism_cannot_cut_are_refused():
    """Claim: a pack is never cut into unequal or overlapping shares."""
    with pytest.raises(ValueError, match="pack of 7 tokens is not divisible by context parallel size 2"):
        local_rows(7, _Group(0, 2))
    shares = [local_rows(8, _Group(rank, 4)) for rank in range(4)]
    assert [(s.first, s.last) for s in shares] == [(0, 2), (2, 4), (4, 6), (6, 8)]


def picture_batch(tiny):
    samples = tiny.encode([reference.Sample((2, (1, 4, 6), 3))], MaskKind.BIDIRECTIONAL)
    return tiny.pack(samples, MaskKind.BIDIRECTIONAL)


def test_cut_image_tokens_are_refused(tiny):
    """Claim: fewer placeholders than features would shift every picture after them: refused in the model itself."""
    batch = picture_batch(tiny)
    with pytest.raises(ValueError, match="5 image placeholder tokens for 6 image features"):
        tiny.chunk(replace(batch, feature_positions=batch.feature_positions[:-1]))
    with pytest.raises(ValueError, match="6 image placeholder tokens for 0 image features"):
        tiny.chunk(replace(batch, grid_thw=(), pixel_values=None))


def test_pixels_that_do_not_fit_their_grids_are_refused(tiny):
    """Claim: a picture is never read with another picture's shape."""
    batch = picture_batch(tiny)
    with pytest.raises(ValueError, match=r"20 patches for grids \[\(1, 4, 6\)\]: 24 needed"):
        tiny.chunk(replace(batch, pixel_values=batch.pixel_values[:20]))


def test_segment_tables_of_another_pack_are_refused(tiny):
    """Claim: attention never runs under a table that does not cover the rows at hand."""
    context = SequenceContext(segments=SegmentTable.from_lengths([5]))
    with pytest.raises(ValueError, match="segment table covers 5 rows, attention has 6"):
        tiny.chunk.language_model(torch.zeros(6, 1, 64), context)


@pytest.mark.parametrize(
    "parallel, recompute, message",
    [
        ({}, dict(language="full", language_num_layers=3), "language_num_layers 3 does not divide the 4 language"),
        ({}, dict(vision="full", vision_num_layers=50), "vision_num_layers 50 does not divide the 4 vision layers"),
        (
            dict(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=1),
            dict(language="full", language_num_layers=3),
            "language_num_layers 3 does not divide the 1 language layers",
        ),
        (
            dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
            dict(language="full", language_num_layers=2),
            "language_num_layers 2 does not divide the 1 language layers",
        ),
    ],
)
def test_blocks_of_recomputed_layers_must_come_out_even(parallel, recompute, message):
    """Claim: Megatron would index a layer that is not there, in the first step; the message comes before any row."""
    settings = TrainSettings(parallel=ParallelSettings(**parallel), recompute=RecomputeSettings(**recompute))
    with pytest.raises(ValueError, match=message):
        check_model(ARCHITECTURE, settings)
    counted = {name: number for name, number in recompute.items() if name.endswith("_num_layers")}
    check_model(ARCHITECTURE, replace(settings, recompute=replace(settings.recompute, **dict.fromkeys(counted, 1))))


@pytest.mark.parametrize(
    "model, message",
    [
        (dict(attention_backend="flex"), "flex has no backward pass on a CPU: choose model.attention_backend=sdpa"),
        (dict(vision_attention_backend="flash"), "choose model.vision_attention_backend=sdpa instead$"),
        (dict(transformer_impl="transformer_engine"), "transformer_impl transformer_engine needs"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused here runs on a GPU")
def test_kernels_that_cannot_train_here_are_refused_before_anything_is_read(model, message):
    """Claim: a backend is told by the setting that chose it, and not by the first step's traceback."""
    with pytest.raises(ValueError, match=message):
        check_model(ARCHITECTURE, TrainSettings(model=ModelSettings(**model)))
