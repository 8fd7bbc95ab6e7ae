"""A run starts from the same weights whether they come from a folder or from its converted checkpoint."""

import json
import os
from dataclasses import replace

import pytest
import torch

from megatron_cocoa.checkpoint.info import CheckpointInfo
from megatron_cocoa.checkpoint.initial import WeightSource, load_initial_weights
from megatron_cocoa.checkpoint.store import load_checkpoint, save_checkpoint
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.conversion.hf_to_mcore import UNKNOWN_TOKEN, convert_hf_to_mcore
from megatron_cocoa.model.build import build_model
from tests.parity import compare, reference
from tests.parity.cases import Case
from tests.unit.rewritten import rewrite_checkpoint

MASK_TOKEN, USED_ROWS = 155, 156


def start(
    chunk, table, source: WeightSource, *, decoder_layers: int = 1, vision_ffn_multiple: int = 1
) -> dict[str, torch.Tensor]:
    model = dict(vision_ffn_multiple=vision_ffn_multiple)
    settings = compare.settings_of(Case("unit", decoder_layers=decoder_layers, model=model))
    model = build_model(chunk.architecture, settings, with_image_decoder=True)
    with torch.no_grad():
        for parameter in model.chunks[0].parameters():
            parameter.fill_(torch.nan)
    load_initial_weights(model.chunks, table, source)
    return dict(model.chunks[0].named_parameters())


def test_folder_and_converted_checkpoint_give_the_same_start(tiny, tmp_path):
    """Claim: every weight is equal, the mask token's row and the image decoder included, and none is left unset."""
    tiny.huggingface.save_pretrained(tmp_path / "hf")
    convert_hf_to_mcore(tmp_path / "hf", tmp_path / "mcore")
    table = compare.name_table(tiny.huggingface.config, compare.settings_of(Case("unit")))
    folder = WeightSource(tmp_path / "hf", None, seed=3, mask_token_id=MASK_TOKEN, used_rows=USED_ROWS)
    wanted = start(tiny.chunk, table, folder)
    found = start(tiny.chunk, table, replace(folder, checkpoint=tmp_path / "mcore"))
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        assert not weight.isnan().any(), name
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-7, msg=name)
    row = found["language_model.embedding.word_embeddings.weight"][MASK_TOKEN]
    embedding = tiny.huggingface.get_input_embeddings().weight
    # The mean of 155 float32 numbers, summed in another order.
    torch.testing.assert_close(row, embedding[:MASK_TOKEN].mean(0), rtol=1e-5, atol=1e-6)
    middle = found["language_model.decoder.layers.2.mlp.linear_fc2.weight"]
    assert torch.equal(found["image_decoder.decoder.layers.0.mlp.linear_fc2.weight"], middle)


@pytest.mark.parametrize("stored, run", [(1, 40), (40, 1), (40, 56)])
def test_a_checkpoint_starts_a_run_with_another_padding_of_the_tower(tiny, tmp_path, stored, run):
    """Claim: every weight is what a folder gives, exactly, where layouts of two stages need other ffn widths."""
    tiny.huggingface.save_pretrained(tmp_path / "hf")
    convert_hf_to_mcore(tmp_path / "hf", tmp_path / "mcore", vision_ffn_multiple=stored)
    settings = compare.settings_of(Case("unit", model=dict(vision_ffn_multiple=run)))
    table = compare.name_table(tiny.huggingface.config, settings)
    folder = WeightSource(tmp_path / "hf", None, seed=3, mask_token_id=MASK_TOKEN, used_rows=USED_ROWS)
    wanted = start(tiny.chunk, table, folder, vision_ffn_multiple=run)
    found = start(tiny.chunk, table, replace(folder, checkpoint=tmp_path / "mcore"), vision_ffn_multiple=run)
    tower = [name for name in wanted if name.startswith("vision_model.")]
    assert len(tower) > 20 and all(torch.equal(found[name], wanted[name]) for name in tower)


def test_a_converted_checkpoint_has_the_keys_that_megatron_writes(tiny, tmp_path):
    """Claim: the import of a folder names the same tensors and empty states as Megatron's own of the model."""
    tiny.huggingface.save_pretrained(tmp_path / "hf")
    convert_hf_to_mcore(tmp_path / "hf", tmp_path / "mcore")
    info = CheckpointInfo("warmup", 1, MASK_TOKEN, UNKNOWN_TOKEN, tiny.huggingface.config.to_dict())
    save_checkpoint(tmp_path / "saved", [tiny.chunk], info)
    with TorchDistReader(tmp_path / "mcore") as found, TorchDistReader(tmp_path / "saved") as wanted:
        assert set(found.keys()) == set(wanted.keys())
        assert set(found.state_keys()) == set(wanted.state_keys()) != set()


def cut(path):
    largest = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut, r"mcore/.*\.distcp has \d+ bytes"),
        (lambda path: (path / ".metadata").write_bytes(b"garbage"), r"mcore/\.metadata"),
        (lambda path: (path / ".metadata").unlink(), r"mcore is incomplete"),
    ],
)
def test_a_damaged_checkpoint_is_named(tiny, tmp_path, damage, message):
    """Claim: what is wrong with which folder is one message, not a traceback from inside of torch."""
    tiny.huggingface.save_pretrained(tmp_path / "hf")
    convert_hf_to_mcore(tmp_path / "hf", tmp_path / "mcore")
    damage(tmp_path / "mcore")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "mcore", [tiny.chunk])


def test_a_checkpoint_of_another_model_is_refused_with_both_shapes(tiny, tmp_path):
    """Claim: shapes that do not fit are found before anything is loaded, with what was found and needed."""
    other = reference.tiny_huggingface(reference.tiny_config("qwen2_5_vl", layers=2))
    other.save_pretrained(tmp_path / "hf")
    convert_hf_to_mcore(tmp_path / "hf", tmp_path / "mcore")
    with pytest.raises(ValueError, match=r"does not fit the model, \d+ tensor.* is \(.*\), needed \("):
        load_checkpoint(tmp_path / "mcore", [tiny.chunk])


def test_weights_alone_are_no_place_to_resume_from(tiny, tmp_path):
    """Claim: an imported model is refused with what it can be used for, before anything of it is loaded."""
    tiny.huggingface.save_pretrained(tmp_path / "hf")
    convert_hf_to_mcore(tmp_path / "hf", tmp_path / "mcore")
    with pytest.raises(ValueError, match="mcore holds weights alone: it can start a stage"):
        load_checkpoint(tmp_path / "mcore", [tiny.chunk], optimizer=object())


@pytest.mark.parametrize("may_be_missing", [(), ("image_decoder.",)])
def test_a_checkpoint_that_lacks_a_parameter_is_refused(tiny, tmp_path, may_be_missing):
    """Claim: no parameter keeps the values that it was drawn with, unless it may."""
    tiny.huggingface.save_pretrained(tmp_path / "hf")
    convert_hf_to_mcore(tmp_path / "hf", tmp_path / "mcore")
    lost = "language_model.decoder.final_layernorm.weight"
    path = rewrite_checkpoint(tmp_path / "mcore", tmp_path / "lacking", lambda tensors: tensors.pop(lost))
    with pytest.raises(ValueError, match=f"lacking lacks 1 parameters of the model: {lost}"):
        load_checkpoint(path, [tiny.chunk], may_be_missing=may_be_missing)


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "neither model.safetensors nor .* model.random_weights true draws"),
        ({"pytorch_model.bin": ""}, "no safetensors. Pickles can run code"),
        ({"model.safetensors.index.json": json.dumps({"weight_map": {"x": "a.safetensors"}})}, "a.safetensors"),
    ],
)
def test_a_folder_without_its_weights_is_not_trained_from_nothing(tmp_path, files, message):
    """Claim: a download that was cut short is an error before the model is built, unless weights are to be drawn."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    source = WeightSource(tmp_path, None, seed=3, mask_token_id=MASK_TOKEN, used_rows=USED_ROWS)
    with pytest.raises(ValueError, match=message):
        source.check()
    replace(source, may_be_random=True).check()


@pytest.mark.parametrize("stage", ["warmup", "bridge"])
def test_an_image_decoder_goes_on_from_warmup_alone(tiny, tmp_path, stage):
    """Claim: a checkpoint of warmup brings the decoder that it has trained; that of a stage without one starts a new
    one from the middle layer. All else comes as it was, and another mask token is refused."""
    tiny.huggingface.save_pretrained(tmp_path / "hf")
    settings = compare.settings_of(Case("unit", decoder_layers=1))
    table = compare.name_table(tiny.huggingface.config, settings)
    source = WeightSource(tmp_path / "hf", None, seed=3, mask_token_id=MASK_TOKEN, used_rows=USED_ROWS)
    trained = build_model(tiny.chunk.architecture, settings, with_image_decoder=stage == "warmup")
    load_initial_weights(trained.chunks, table, source)
    weights = dict(trained.bare_chunks[0].named_parameters())
    with torch.no_grad():
        for number, weight in enumerate(weights.values()):
            weight.add_(0.01 * number)
    info = CheckpointInfo(stage, 1, MASK_TOKEN, UNKNOWN_TOKEN, tiny.huggingface.config.to_dict())
    save_checkpoint(tmp_path / "trained", trained.bare_chunks, info)
    found = start(tiny.chunk, table, replace(source, checkpoint=tmp_path / "trained"))
    assert [name for name, weight in weights.items() if not torch.equal(found[name], weight)] == []
    with pytest.raises(ValueError, match="was trained with mask token id 155, this run's tokenizer gives 154"):
        start(tiny.chunk, table, replace(source, checkpoint=tmp_path / "trained", mask_token_id=154))
    decoder = {name for name in found if name.startswith("image_decoder.")}
    assert decoder and decoder == (decoder & weights.keys() if stage == "warmup" else found.keys() - weights.keys())
    for name in decoder - weights.keys():
        middle = name.replace("image_decoder.decoder.layers.0", "language_model.decoder.layers.2")
        assert torch.equal(found[name], found[middle]) if middle != name else not found[name].isnan().any()


def decoder_starts(tiny, folder, **changed) -> list[torch.Tensor]:
    """A weight of each of the image decoder's layers, and the language model's layers' beside them."""
    table = compare.name_table(tiny.huggingface.config, compare.settings_of(Case("unit")))
    source = WeightSource(folder, None, seed=3, mask_token_id=MASK_TOKEN, used_rows=USED_ROWS, may_be_random=True)
    number = changed.pop("decoder_layers")
    found = start(tiny.chunk, table, replace(source, **changed), decoder_layers=number)
    assert not any(weight.isnan().any() for weight in found.values())
    name = "decoder.layers.{}.mlp.linear_fc1.weight"
    decoder = [found[f"image_decoder.{name.format(i)}"] for i in range(number)]
    return [decoder, [found[f"language_model.{name.format(i)}"] for i in range(4)], found]


def test_layers_of_the_image_decoder_start_from_consecutive_ones(tiny, tmp_path):
    """Claim: two layers start from the middle and the next, three from as far up as there are, five are refused."""
    tiny.huggingface.save_pretrained(tmp_path)
    for number, first in ((2, 2), (3, 1)):
        decoder, language, _ = decoder_starts(tiny, tmp_path, decoder_layers=number)
        for index, weight in enumerate(decoder):
            assert torch.equal(weight, language[first + index])
    with pytest.raises(ValueError, match="warmup.decoder_layers is 5, and the language model has 4 layers"):
        decoder_starts(tiny, tmp_path, decoder_layers=5)


def test_a_random_image_decoder_is_fresh_and_follows_the_seed(tiny, tmp_path):
    """Claim: random layers differ from each other, from the model's, and by seed; their norms are one; more may stand
    than the model has; and a model that is random itself does not hand its values down."""
    tiny.huggingface.save_pretrained(tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "hf", tmp_path / "empty"):
        decoder, language, found = decoder_starts(tiny, folder, decoder_layers=5, decoder_init="random")
        for index, weight in enumerate(decoder):
            assert not any(torch.equal(weight, other) for other in decoder[:index] + language)
            # 4,000 and more draws of N(0, 0.02).
            assert abs(float(weight.std()) - 0.02) < 0.002
        assert all((w == 1).all() for n, w in found.items() if n.startswith("image_decoder.decoder") and "norm" in n)
        again, _, _ = decoder_starts(tiny, folder, decoder_layers=5, decoder_init="random")
        other, _, _ = decoder_starts(tiny, folder, decoder_layers=5, decoder_init="random", seed=4)
        assert all(map(torch.equal, decoder, again)) and not any(map(torch.equal, decoder, other))
