"""What a run needs before a model is built."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_cocoa.batch import MaskKind
from megatron_cocoa.checkpoint.info import INFO_FILE, CheckpointInfo
from megatron_cocoa.checkpoint.torch_dist_reader import BACKEND_FILE
from megatron_cocoa.config import EmbeddingSettings, ParallelSettings, ValidationSettings
from megatron_cocoa.conversion.hf_to_mcore import read_config
from megatron_cocoa.data.toy import ToyPaths
from megatron_cocoa.recipes import context as context_module
from megatron_cocoa.recipes.context import evaluation_parts, prepare_context
from megatron_cocoa.recipes.embedding_model import picture_sizes
from tests.distributed.tiny_run import tiny_settings


def test_evaluation_without_a_pool_is_refused(tiny_folders, tmp_path):
    """Claim: a run that is asked for measurements does not train without them and say nothing."""
    settings = tiny_settings(tiny_folders, evaluate=True)
    assert prepare_context(settings).settings == settings
    nothing = replace(settings, data=replace(settings.data, path=str(tmp_path)))
    message = "has neither eval_heldout.jsonl nor eval_train.jsonl .* or set evaluate to false"
    with pytest.raises(ValueError, match=message):
        prepare_context(nothing)
    prepare_context(replace(nothing, evaluate=False))


def test_measurements_are_taken_as_the_stage_trains(tiny_folders):
    """Claim: pictures have the stage's size or limits, inputs the form that it embeds in, and packs suit the layout;
    an image decoder starts as the stage says."""
    settings = tiny_settings(tiny_folders)
    settings = replace(
        settings,
        parallel=ParallelSettings(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2),
        warmup=replace(settings.warmup, decoder_init="random"),
    )
    context = prepare_context(settings)
    form = dict(attention="causal", image_placeholder="bare")
    builder, options = evaluation_parts(context, replace(settings.contrastive, image_size=56, **form))
    assert (builder.image_placeholder, options.embedding_mask) == ("bare", MaskKind.CAUSAL)
    assert builder.pictures.image_size == 56 and options.pad_to_multiple_of == 2 * 2
    limits = dict(image_size=None, min_image_tokens=9, max_image_tokens=25)
    builder, options = evaluation_parts(context, replace(settings.contrastive, **limits))
    assert (builder.image_placeholder, options.embedding_mask) == ("full", MaskKind.BIDIRECTIONAL)
    unit = context.architecture.vision.size_factor ** 2
    assert tuple(builder.pictures.pixel_limits) == (9 * unit, 25 * unit)
    assert context.weight_source(None).decoder_init == "random"


def test_validation_without_its_pool_is_refused_before_anything_is_read(tiny_folders, tmp_path):
    """Claim: the pool that validation needs is missed at the start, and not once rows and weights are there."""
    settings = tiny_settings(tiny_folders, validation=ValidationSettings(interval=1))
    assert prepare_context(settings).settings == settings
    (tmp_path / "eval_train.jsonl").touch()
    with pytest.raises(ValueError, match="has no eval_heldout.jsonl to validate on: write one"):
        prepare_context(replace(settings, data=replace(settings.data, path=str(tmp_path))))


def test_a_name_on_the_hub_is_told_how_to_become_a_folder(tmp_path):
    """Claim: who gives a model's name reads that there is no such folder, and the command that makes one."""
    with pytest.raises(ValueError, match="^Qwen/No does not exist: .* hf download Qwen/No --local-dir No$"):
        read_config(Path("Qwen/No"))
    for path in ("~/model", "../model"):
        with pytest.raises(ValueError, match="model does not exist: .* folder$"):
            read_config(Path(path))
    with pytest.raises(ValueError, match="absent does not exist: .* folder$"):
        read_config(tmp_path / "absent")
    with pytest.raises(ValueError, match="has no config.json"):
        read_config(tmp_path)


def test_a_value_of_the_wrong_type_is_a_line_with_its_name(tmp_path):
    """Claim: transformers checks the types of a config.json by exceptions of its own kind; they end in one message."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl", "text_config": {"vocab_size": "512"}}')
    with pytest.raises(ValueError, match=r"(?s)config.json is no valid configuration .*'vocab_size' expected int"):
        read_config(tmp_path)


def test_a_checkpoint_that_cannot_be_seen_is_left_to_who_loads_it(tiny_folders, tmp_path):
    """Claim: a file system that fails ends in a message there, and no run that resumes and does not need it."""
    (tmp_path / "cocoa.json").mkdir()
    settings = tiny_settings(tiny_folders)
    context = prepare_context(replace(settings, model=replace(settings.model, load=str(tmp_path))))
    with pytest.raises(ValueError, match="cannot be read: .*Is a directory"):
        context.weight_source(None).check()


def test_weights_of_another_model_than_the_folder_describes_are_refused(tiny_folders, tmp_path):
    """Claim: a checkpoint is not trained on with another rotary base than its own, though all shapes fit."""
    settings = tiny_settings(tiny_folders)
    context = prepare_context(settings)
    loaded = replace(settings, model=replace(settings.model, load=str(tmp_path)))
    prepare_context(loaded)
    info = CheckpointInfo("import", 0, -1, -1, hf_config=context.hf_config)
    (tmp_path / "metadata.json").write_text("{}")
    (tmp_path / "cocoa.json").write_text(json.dumps(asdict(info)))
    prepare_context(loaded)
    rope = context.hf_config["text_config"]["rope_parameters"]
    text = context.hf_config["text_config"] | {"rope_parameters": rope | {"rope_theta": 5e6}}
    other = replace(info, hf_config=info.hf_config | {"text_config": text})
    (tmp_path / "cocoa.json").write_text(json.dumps(asdict(other)))
    with pytest.raises(ValueError, match="another model than .* holds: text.rope_theta is 1000000.0, needed 5000000.0"):
        prepare_context(loaded)


def test_other_folders_than_a_checkpoint_are_told_what_to_name(tiny_folders, tmp_path):
    """Claim: who gives model.load a run, a stage or a Hugging Face folder reads what to give instead."""
    checkpoint = tmp_path / "run" / "bridge" / "checkpoint"
    checkpoint.mkdir(parents=True)
    for name in (INFO_FILE, BACKEND_FILE):
        (checkpoint / name).write_text("{}")
    settings = tiny_settings(tiny_folders)

    def check(folder: Path) -> None:
        loading = replace(settings, model=replace(settings.model, load=str(folder)))
        prepare_context(loading).weight_source(None).check()

    with pytest.raises(ValueError, match=f"is a folder around checkpoints: name .* {checkpoint}$"):
        picture_sizes(tmp_path / "run", EmbeddingSettings())
    for folder in (tmp_path / "run", tmp_path / "run" / "bridge"):
        with pytest.raises(ValueError, match=f"{folder} is a folder around checkpoints: name .* {checkpoint}$"):
            check(folder)
    with pytest.raises(ValueError, match="model is a Hugging Face folder, .*: name it as model.path instead"):
        check(tiny_folders / "model")
    with pytest.raises(ValueError, match="absent does not exist"):
        check(tmp_path / "absent")


def test_the_mask_token_is_the_one_that_is_asked_for(tiny_folders):
    """Claim: ``model.mask_token`` names a token of the tokenizer, and its id is the one that hides text."""
    settings = tiny_settings(tiny_folders)
    asked = prepare_context(replace(settings, model=replace(settings.model, mask_token="<|quad_end|>")))
    vocabulary = json.loads((tiny_folders / "model" / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in vocabulary}
    assert asked.bundle.mask_token_id == asked.weight_source(None).mask_token_id == ids["<|quad_end|>"]


def test_a_toy_run_reads_the_data_that_it_is_given(tiny_folders, tmp_path, monkeypatch):
    """Claim: without a model folder the toy model is made, and its data is read only where no other is named."""
    toy = ToyPaths(tiny_folders / "pairs", tiny_folders / "model")
    monkeypatch.setattr(context_module, "prepare_toy", lambda folder: toy)
    settings = tiny_settings(tiny_folders)
    settings = replace(settings, model=replace(settings.model, path=None))
    for given, read in ((str(tmp_path), tmp_path), (None, toy.pairs)):
        context = prepare_context(replace(settings, data=replace(settings.data, path=given)))
        assert context.is_toy and context.settings.model.path == str(toy.model)
        assert context.settings.data.path == str(read)
