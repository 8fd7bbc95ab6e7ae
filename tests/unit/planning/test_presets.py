"""Every preset with every stage's file: it parses, divides, and builds at the layout that it names, on every rank."""

from __future__ import annotations

import functools
from dataclasses import fields, replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.config import ParallelSettings, TrainSettings
from megatron_cocoa.data.toy_model import ToyModelSizes, train_tokenizer, write_model_folder
from megatron_cocoa.model.qwen_vl import QwenVL
from megatron_cocoa.planning.memory import HEADROOM
from megatron_cocoa.planning.parameters import layers_of_stage, rank_parameters
from megatron_cocoa.planning.published import PUBLISHED_SIZES
from megatron_cocoa.planning.published import published_architecture as planned_architecture
from megatron_cocoa.planning.tables import GIB, PRESET_GPUS, preset_memory
from megatron_cocoa.settings.parse import parse_settings
from megatron_cocoa.settings.presets import available_presets
from tests.meta_build import build_on_meta
from tests.unit.published import PUBLISHED, published_architecture

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "examples" / "configs").glob("*.yaml"))
EVERY_FILE = pytest.mark.parametrize(
    "config", [None, *CONFIGS], ids=lambda path: "all-stages" if path is None else path.stem
)
FOLDERS = ["--model.path=not-read", "--data.path=not-read"]


def settings_of(preset: str, *options: str) -> TrainSettings:
    return parse_settings([f"--preset={preset}", *FOLDERS, *options])


def settings_with(preset: str, config: Path | None) -> TrainSettings:
    return settings_of(preset, *([] if config is None else [f"--config={config}"]))


@pytest.fixture(scope="module")
def toy_architecture(tmp_path_factory) -> QwenVLArchitecture:
    folder = tmp_path_factory.mktemp("toy") / "model"
    tokenizer, _ = train_tokenizer(["red panda", "small blue house", "sol y luna"] * 40, num_pieces=300)
    write_model_folder(folder, tokenizer, ToyModelSizes(tokenizer_pieces=300))
    return QwenVLArchitecture.from_huggingface(AutoConfig.from_pretrained(folder))


@functools.lru_cache(maxsize=None)
def check_rank(
    architecture: QwenVLArchitecture, settings: TrainSettings, pipeline_rank: int, with_image_decoder: bool
) -> None:
    model = build_on_meta(architecture, settings, pipeline_rank=pipeline_rank, with_image_decoder=with_image_decoder)
    assert all(isinstance(chunk, QwenVL) for chunk in model.chunks)
    parameters = [p for chunk in model.chunks for p in chunk.parameters()]
    assert all(p.is_meta for p in parameters)
    counted = rank_parameters(
        architecture, settings, pipeline_rank=pipeline_rank, with_image_decoder=with_image_decoder
    )
    assert counted.trainable == sum(p.numel() for p in parameters if p.requires_grad)
    assert counted.frozen == sum(p.numel() for p in parameters if not p.requires_grad)
    layers = sum(len(chunk.language_model.decoder.layers) for chunk in model.chunks)
    parallel, depth = settings.parallel, architecture.text.num_hidden_layers
    assert layers == layers_of_stage(depth, parallel, pipeline_rank)


def check_build(architecture: QwenVLArchitecture, settings: TrainSettings) -> None:
    """Build every pipeline rank; what a stage's length or rate says does not change what is built."""
    model_only = TrainSettings(
        model=settings.model, parallel=settings.parallel, recompute=settings.recompute, freeze=settings.freeze
    )
    for rank in range(settings.parallel.pipeline_model_parallel_size):
        check_rank(architecture, model_only, rank, "warmup" in settings.stages)


@EVERY_FILE
@pytest.mark.parametrize("preset", PUBLISHED_SIZES)
def test_presets_build_with_every_stages_file(preset, config):
    """Claim: all shipped YAML parses, its batches divide over the GPUs it names, and the model builds there.

    Counted parameters equal the built ones exactly, so computed memory stands on what is really built.
    """
    settings = settings_with(preset, config)
    replicas = settings.parallel.data_parallel_size(PRESET_GPUS[preset])
    assert all(settings.stage(stage).num_microbatches(replicas) >= 1 for stage in settings.stages)
    check_build(planned_architecture(preset), settings)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_toy_preset_builds_with_every_stages_file(config, toy_architecture):
    """Claim: the files combine with the toy preset too."""
    check_build(toy_architecture, settings_of("toy", f"--config={config}"))


def test_every_published_size_has_a_preset():
    """Claim: no published size is left without a layout, and no preset without a number of GPUs."""
    sized = [name for name in available_presets() if name != "toy"]
    assert sorted(PUBLISHED_SIZES) == sorted(name.lower() for name in PUBLISHED) == sorted(sized) == sorted(PRESET_GPUS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_planned_shapes_are_the_published_ones(name):
    """Claim: the planner's own table has the shapes of each checkpoint's config.json.

    The fixture leaves fields that change no shape at the library's defaults: those are not compared.
    """
    ours, theirs = planned_architecture(name.lower()), published_architecture(name)
    shapeless = {"rms_norm_eps", "max_position_embeddings", "tokens_per_second"}
    for part in ("vision", "text"):
        mine, wanted = getattr(ours, part), getattr(theirs, part)
        for f in fields(mine):
            if f.name not in shapeless:
                assert getattr(mine, f.name) == getattr(wanted, f.name), (part, f.name)
    assert replace(ours, vision=theirs.vision, text=theirs.text) == theirs


@EVERY_FILE
@pytest.mark.parametrize("preset", PUBLISHED_SIZES)
def test_presets_fit_an_h100(preset, config):
    """Claim: every preset fits 80 GB on the GPUs that it names, in every stage, with the planner's headroom.

    Adapters keep more than full training does.
    """
    settings = settings_with(preset, config)
    for stage in settings.stages:
        worst = max(rank.total for rank in preset_memory(preset, settings, stage, PRESET_GPUS[preset]))
        assert worst <= (1 - HEADROOM) * 79.6 * GIB, (stage, worst / GIB)


LAYOUTS = {
    "tp4-frozen-language": (dict(tensor_model_parallel_size=4), dict(language=True)),
    "tp4-pp2-uneven": (
        dict(tensor_model_parallel_size=4, pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=10), {}
    ),
    "pp2-vpp2-frozen-vision": (
        dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2), dict(vision=True)
    ),
    "cp2-pp4-last": (
        dict(context_parallel_size=2, pipeline_model_parallel_size=4, num_layers_in_last_pipeline_stage=3), {}
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preset", ["qwen2.5-vl-3b", "qwen2-vl-2b"])
def test_counted_parameters_equal_built_ones_at_other_layouts(preset, layout):
    """Claim: tied matrices on two stages, uneven and virtual pipelines and frozen parts are counted as built."""
    degrees, frozen = LAYOUTS[layout]
    settings = settings_of(preset)
    if preset == "qwen2-vl-2b" and "last" in layout:
        degrees = degrees | dict(num_layers_in_last_pipeline_stage=4)
    settings = replace(settings, parallel=ParallelSettings(**degrees), freeze=replace(settings.freeze, **frozen))
    check_build(planned_architecture(preset), settings)


def test_every_layer_of_the_image_decoder_is_counted():
    """Claim: a decoder deeper than MoCa's one layer is counted as built."""
    settings = settings_of("qwen2-vl-2b", "--warmup.decoder_layers=3")
    settings = replace(settings, parallel=ParallelSettings())
    check_rank(planned_architecture("qwen2-vl-2b"), settings, 0, True)
