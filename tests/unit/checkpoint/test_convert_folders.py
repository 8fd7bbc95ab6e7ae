"""Both converters as functions: exact in every shape and form, and whole or not there at all."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.checkpoint import placement, torch_dist_writer
from megatron_cocoa.checkpoint.bits import same_bits
from megatron_cocoa.checkpoint.comparison import compare_weights
from megatron_cocoa.checkpoint.huggingface import HuggingFaceReader
from megatron_cocoa.checkpoint.info import read_info
from megatron_cocoa.checkpoint.stacked import StackedTensors
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.conversion.hf_to_mcore import UNKNOWN_TOKEN, config_of, convert_hf_to_mcore
from megatron_cocoa.conversion.mcore_to_hf import convert_mcore_to_hf, table_of
from tests.unit.rewritten import rewrite_checkpoint

EMBEDDING = "language_model.embedding.word_embeddings.weight"


@pytest.fixture
def source(tmp_path, tiny):
    config = tiny.config("qwen2_5_vl", tied=True)
    return tiny.write(tmp_path / "source", tiny.state(tiny.model("qwen2_5_vl", tied=True)), config, num_files=2)


def content(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_equal_weights(folder, state) -> None:
    with HuggingFaceReader(folder) as reader:
        assert set(reader.keys()) == set(state)
        for name, tensor in state.items():
            assert same_bits(reader.get(name), tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling, num_files", [("flat", 1), ("flat", 3), ("nested", 1), ("nested", 3)])
def test_round_trip_is_bit_exact(tmp_path, tiny, model_type, tied, dtype, spelling, num_files, monkeypatch):
    """Every tensor of both families comes back, tied and untied, in both spellings, from one file and from several."""
    # Small chunks, so that row blocks and gated halves are cut as in a large model.
    monkeypatch.setattr("megatron_cocoa.checkpoint.import_hf.CHUNK_BYTES", 1000)
    model = tiny.model(model_type, tied=tied, dtype=dtype)
    state = tiny.state(model)
    folder = tiny.write(tmp_path / "source", state, model.config, spelling=spelling, num_files=num_files)
    report = convert_hf_to_mcore(folder, tmp_path / "mcore", vision_ffn_multiple=16)
    assert report.num_hf_tensors == len(state) and report.ignored == {}
    back = convert_mcore_to_hf(
        tmp_path / "mcore", tmp_path / "back", spelling=spelling, max_shard_bytes=10**9 if num_files == 1 else 30_000
    )
    assert (len(back.files) > 1) == (num_files > 1)
    assert_equal_weights(tmp_path / "back", state)
    with TorchDistReader(tmp_path / "mcore") as reader:
        tensors = StackedTensors(reader)
        assert tensors.dtypes == {dtype}
        table = table_of(tmp_path / "mcore", tensors)
    compared = compare_weights(folder, tmp_path / "mcore", table, source="huggingface")
    assert compared.num_tensors == len(state) and compared.different == ()
    loaded = tiny.classes[model_type][1].from_pretrained(tmp_path / "back", dtype="auto")
    assert all(same_bits(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_casts_are_those_of_torch(tmp_path, tiny, source):
    """--dtype rounds each tensor as torch does, in either converter, and the comparison knows."""
    state = {n: t for file in source.glob("*.safetensors") for n, t in load_file(file).items()}
    convert_hf_to_mcore(source, tmp_path / "bf16", dtype=torch.bfloat16)
    convert_mcore_to_hf(tmp_path / "bf16", tmp_path / "back")
    assert_equal_weights(tmp_path / "back", {n: t.bfloat16() for n, t in state.items()})
    convert_hf_to_mcore(source, tmp_path / "fp32")
    convert_mcore_to_hf(tmp_path / "fp32", tmp_path / "narrow", dtype=torch.bfloat16)
    assert_equal_weights(tmp_path / "narrow", {n: t.bfloat16() for n, t in state.items()})
    with TorchDistReader(tmp_path / "fp32") as reader:
        table = table_of(tmp_path / "fp32", StackedTensors(reader))
    assert compare_weights(source, tmp_path / "bf16", table, source="huggingface").different == ()
    assert compare_weights(tmp_path / "narrow", tmp_path / "fp32", table, source="megatron").different == ()


def test_mixed_dtypes_are_refused_or_cast(tmp_path, tiny):
    """A stacked tensor has one dtype: a folder with two is refused with the way out."""
    state = tiny.state(tiny.model("qwen2_vl", tied=True))
    state["model.layers.1.mlp.down_proj.weight"] = state["model.layers.1.mlp.down_proj.weight"].bfloat16()
    folder = tiny.write(tmp_path / "source", state, tiny.config("qwen2_vl", tied=True))
    with pytest.raises(ValueError, match=r"1 BF16 \(model.layers.1.mlp.down_proj.weight\).*choose --dtype bf16"):
        convert_hf_to_mcore(folder, tmp_path / "m")
    assert names_in(tmp_path) == ["source"]
    convert_hf_to_mcore(folder, tmp_path / "m", dtype=torch.float32)
    convert_mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert_equal_weights(tmp_path / "back", {name: tensor.float() for name, tensor in state.items()})


def test_the_checkpoint_says_what_it_is(tmp_path, source):
    """Stage, configuration and companion files travel along; a folder without tokenizer has no token ids."""
    (source / "chat_template.jinja").write_text("x")
    (source / "modeling_other.py").write_text("raise SystemExit")
    convert_hf_to_mcore(source, tmp_path / "m")
    info = read_info(tmp_path / "m")
    assert (info.stage, info.step, info.has_optimizer) == ("import", 0, False)
    assert info.mask_token_id == info.bridge_token_id == UNKNOWN_TOKEN
    assert info.hf_config == json.loads((source / "config.json").read_text())
    assert {"config.json", "chat_template.jinja"} <= set(names_in(tmp_path / "m" / "huggingface"))
    assert "modeling_other.py" not in names_in(tmp_path / "m" / "huggingface")
    report = convert_mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert (tmp_path / "back" / "chat_template.jinja").exists()
    assert any("no tokenizer" in line for line in report.left_out)
    shutil.rmtree(tmp_path / "m" / "huggingface")
    convert_mcore_to_hf(tmp_path / "m", tmp_path / "bare")
    assert not (tmp_path / "bare" / "chat_template.jinja").exists()
    convert_mcore_to_hf(tmp_path / "m", tmp_path / "named", companions=source)
    assert (tmp_path / "named" / "chat_template.jinja").exists()


def test_configurations_as_published_are_read():
    """The first releases keep the language model's fields at the top and call the M-RoPE sections rope_scaling."""
    published = dict(
        model_type="qwen2_5_vl", hidden_size=2048, intermediate_size=11008, num_attention_heads=16,
        num_hidden_layers=36, num_key_value_heads=2, rms_norm_eps=1e-06, rope_theta=1000000.0, vocab_size=151936,
        tie_word_embeddings=True, torch_dtype="bfloat16", use_sliding_window=False, sliding_window=32768,
        max_position_embeddings=128000, rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
        vision_config=dict(
            depth=32, hidden_act="silu", hidden_size=1280, intermediate_size=3420, num_heads=16, in_chans=3,
            out_hidden_size=2048, patch_size=14, spatial_merge_size=2, window_size=112, temporal_patch_size=2,
            fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2,
        ),
    )  # fmt: skip
    found = QwenVLArchitecture.from_huggingface(config_of(published, origin="test"))
    assert (found.text.num_hidden_layers, found.text.mrope_section, found.text.rope_theta) == (36, (16, 24, 24), 1e6)
    assert (found.vision.depth, found.vision.intermediate_size, found.tie_word_embeddings) == (32, 3420, True)
    nested = config_of(published, origin="test").to_dict()
    assert QwenVLArchitecture.from_huggingface(config_of(nested, origin="test")) == found
    with pytest.raises(ValueError, match="test has model_type 'qwen3'"):
        config_of({"model_type": "qwen3"}, origin="test")
    with pytest.raises(ValueError, match=r"(?s)test is no valid configuration.*'vocab_size' expected int"):
        config_of(published | {"vocab_size": "151936"}, origin="test")


def test_what_a_folder_cannot_hold_is_left_out_with_a_line(tmp_path, source):
    """Image decoder, optimizer state and trained padding rows: each is said, none is silently lost."""
    convert_hf_to_mcore(source, tmp_path / "m")

    def change(tensors):
        tensors["image_decoder.decoder.layers.mlp.linear_fc2.weight"] = torch.zeros(1, 2, 2)
        tensors["optimizer.state.exp_avg.language_model.decoder.final_layernorm.weight"] = torch.zeros(32)
        tensors[EMBEDDING][60, 1] = 1

    rewrite_checkpoint(tmp_path / "m", tmp_path / "trained", change)
    lines = "\n".join(convert_mcore_to_hf(tmp_path / "trained", tmp_path / "back").left_out)
    assert "1 tensor(s) of image_decoder have no Hugging Face counterpart" in lines
    assert "1 tensor(s) of the optimizer's state" in lines
    assert f"1 non-zero row(s) of {EMBEDDING} beyond the vocabulary's 52" in lines


def test_companions_of_another_model_are_refused(tmp_path, tiny):
    """A folder whose configuration fits the weights and computes something else, or ties a head away, is no companion:
    the comparison would take both models' numbers from it and see nothing."""
    config = tiny.config("qwen2_5_vl", tied=False)
    source = tiny.write(tmp_path / "source", tiny.state(tiny.model("qwen2_5_vl", tied=False)), config)
    convert_hf_to_mcore(source, tmp_path / "m")
    other = shutil.copytree(source, tmp_path / "other")
    for change, said in (
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, needed False"),
        ({"text_config": {"rms_norm_eps": 1e-3}}, "text.rms_norm_eps is 0.001, needed 1e-05"),
        ({"vision_config": {"window_size": 56}}, "vision.window_size is 56, needed 112"),
    ):
        content = json.loads((source / "config.json").read_text())
        content |= {name: content[name] | part if isinstance(part, dict) else part for name, part in change.items()}
        (other / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"other describes another model than .*m holds: {said}. Name"):
            convert_mcore_to_hf(tmp_path / "m", tmp_path / "back", companions=other)
    assert names_in(tmp_path) == ["m", "other", "source"]


def test_megatron_bridge_names_round_trip(tmp_path, tiny, tied):
    """The tower lies whole under Hugging Face's names, the language model under Megatron-Bridge's, and all comes back.

    Names as in Megatron-Bridge's mapping table (qwen25_vl_bridge.py), copied by hand.
    """
    model = tiny.model("qwen2_5_vl", tied=tied)
    state = tiny.state(model)
    folder = tiny.write(tmp_path / "source", state, model.config)
    convert_hf_to_mcore(folder, tmp_path / "m", dialect="megatron-bridge")
    language = {
        "embedding.word_embeddings.weight", "decoder.final_layernorm.weight",
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.self_attention.linear_qkv.weight", "decoder.layers.self_attention.linear_qkv.bias",
        "decoder.layers.self_attention.linear_proj.weight", "decoder.layers.mlp.linear_fc1.weight",
        "decoder.layers.mlp.linear_fc2.weight",
    } | (set() if tied else {"output_layer.weight"})  # fmt: skip
    tower = {name for name in state if name.startswith("visual.")}
    with TorchDistReader(tmp_path / "m") as reader:
        assert set(reader.keys()) == {f"language_model.{name}" for name in language} | tower
        assert all(same_bits(reader.read(name), state[name]) for name in tower)
    convert_mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert_equal_weights(tmp_path / "back", state)
    # Megatron-Bridge's own checkpoints carry neither cocoa.json nor a configuration.
    (tmp_path / "m" / "cocoa.json").unlink()
    shutil.rmtree(tmp_path / "m" / "huggingface")
    convert_mcore_to_hf(tmp_path / "m", tmp_path / "named", companions=folder)
    assert_equal_weights(tmp_path / "named", state)
    other = tiny.write(tmp_path / "qwen2", {}, tiny.config("qwen2_vl", tied=True))
    with pytest.raises(ValueError, match="Megatron-Bridge has no names for qwen2_vl"):
        convert_hf_to_mcore(other, tmp_path / "n", dialect="megatron-bridge")


def test_layers_that_are_not_stacked_are_read(tmp_path, source):
    """A checkpoint whose layers have keys of their own, as Megatron writes them on request, exports alike."""
    convert_hf_to_mcore(source, tmp_path / "m")

    def unstack(tensors):
        for key in [key for key in tensors if ".layers." in key and key.startswith("language_model.")]:
            for layer, tensor in enumerate(tensors.pop(key)):
                tensors[key.replace(".layers.", f".layers.{layer}.")] = tensor

    rewrite_checkpoint(tmp_path / "m", tmp_path / "unstacked", unstack)
    convert_mcore_to_hf(tmp_path / "unstacked", tmp_path / "back")
    with HuggingFaceReader(source) as reader:
        assert_equal_weights(tmp_path / "back", {name: reader.get(name) for name in reader.keys()})


def test_checkpoints_that_do_not_fit_are_refused(tmp_path, source):
    """Unknown, missing and misshapen tensors are listed, and nothing appears at the target."""
    convert_hf_to_mcore(source, tmp_path / "m")
    norm = "language_model.decoder.final_layernorm.weight"

    def unknown(tensors):
        tensors["language_model.adapter.weight"] = tensors.pop(norm)

    def misshapen(tensors):
        tensors[norm] = torch.zeros(31)

    def padded(tensors):
        tensors["vision_model.decoder.layers.mlp.linear_fc2.weight"] = torch.ones(2, 24, 68)
        for name in ("weight", "bias"):
            fc1 = tensors[f"vision_model.decoder.layers.mlp.linear_fc1.{name}"]
            tensors[f"vision_model.decoder.layers.mlp.linear_fc1.{name}"] = fc1.new_zeros(2, 136, *fc1.shape[2:])

    for number, (change, message) in enumerate([
        (unknown, f"1 tensor.* adapter.weight.*1 missing: .*{norm}".replace(" adapter", ".*adapter")),
        (misshapen, r"final_layernorm.weight has shape \(31,\), needed \(32,\)"),
        (padded, "non-zero value"),
    ]):  # fmt: skip
        rewrite_checkpoint(tmp_path / "m", tmp_path / f"bad{number}", change)
        with pytest.raises(ValueError, match=message):
            convert_mcore_to_hf(tmp_path / f"bad{number}", tmp_path / "back")
    assert not (tmp_path / "back").exists() and not placement.leftovers(tmp_path / "back")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_leaves_nothing_new_and_keeps_what_was_there(tmp_path, source, monkeypatch, number):
    """An import that fails half way removes its half; the earlier checkpoint survives an overwrite that fails."""
    convert_hf_to_mcore(source, tmp_path / "m")
    before, source_before = content(tmp_path / "m"), content(source)
    save, calls = torch.save, []

    def failing(value, file, *args, **kwargs):
        calls.append(1)
        if len(calls) > 20:
            raise OSError(number, "disk")
        return save(value, file, *args, **kwargs)

    monkeypatch.setattr(torch_dist_writer.torch, "save", failing)
    for target in ("m", "new"):
        calls.clear()
        with pytest.raises(OSError, match="disk"):
            convert_hf_to_mcore(source, tmp_path / target, overwrite=True)
    assert content(tmp_path / "m") == before and content(source) == source_before
    assert names_in(tmp_path) == ["m", "source"]


def test_too_little_room_is_told_before_writing(tmp_path, source, monkeypatch):
    """The free space is compared with what will be written, with both numbers in the message."""
    convert_hf_to_mcore(source, tmp_path / "m")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(placement.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(ValueError, match="0.00 GB free, needed .* GB for new"):
        convert_hf_to_mcore(source, tmp_path / "new")
    with pytest.raises(ValueError, match="0.00 GB free, needed .* GB for new"):
        convert_mcore_to_hf(tmp_path / "m", tmp_path / "new")
    assert names_in(tmp_path) == ["m", "source"]


def test_existing_targets_are_replaced_only_when_asked_and_only_their_kind(tmp_path, source):
    """No folder is lost by a slip: not without asking, not the source, not a folder of another kind."""
    mcore = tmp_path / "m"
    convert_hf_to_mcore(source, mcore)
    with pytest.raises(ValueError, match="exists: choose another target or ask to overwrite"):
        convert_hf_to_mcore(source, mcore)
    with pytest.raises(ValueError, match="is the source folder itself"):
        convert_hf_to_mcore(source, source, overwrite=True)
    with pytest.raises(ValueError, match="is the source folder itself"):
        convert_mcore_to_hf(mcore, mcore, overwrite=True)
    with pytest.raises(ValueError, match="is not a distributed checkpoint"):
        other = shutil.copytree(source, tmp_path / "other")
        convert_hf_to_mcore(source, other, overwrite=True)
    with pytest.raises(ValueError, match="is not a model folder"):
        second = shutil.copytree(mcore, tmp_path / "second")
        convert_mcore_to_hf(mcore, second, overwrite=True)
    before = content(mcore)
    convert_hf_to_mcore(source, mcore, overwrite=True)
    assert content(mcore).keys() == before.keys()
    assert names_in(tmp_path) == ["m", "other", "second", "source"]


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path, source):
    """A target that is a link to another disk gets the new folder there, and nothing is left beside either."""
    mcore, model = tmp_path / "m", tmp_path / "disk" / "model"
    convert_hf_to_mcore(source, mcore)
    (tmp_path / "disk").mkdir()
    convert_mcore_to_hf(mcore, model, dtype=torch.bfloat16)
    (tmp_path / "link").symlink_to(model)
    convert_mcore_to_hf(mcore, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "link").resolve() == model
    assert names_in(tmp_path) == ["disk", "link", "m", "source"] and names_in(tmp_path / "disk") == ["model"]
    with HuggingFaceReader(model) as reader:
        assert {reader.dtype(name) for name in reader.keys()} == {"F32"}


def test_bad_sources_end_in_one_message(tmp_path, tiny, source):
    """No configuration, another architecture, an unknown key, a truncated shard, a pickle: the source is untouched."""

    def case(change) -> str:
        folder = shutil.copytree(source, tmp_path / "case")
        change(folder)
        before = content(folder)
        with pytest.raises(ValueError) as error:
            convert_hf_to_mcore(folder, tmp_path / "m")
        assert content(folder) == before and not (tmp_path / "m").exists()
        shutil.rmtree(folder)
        return str(error.value)

    def configure(**values):
        def change(folder):
            config = json.loads((folder / "config.json").read_text()) | values
            (folder / "config.json").write_text(json.dumps(config))

        return change

    def truncate(folder):
        shard = sorted(folder.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-7])

    def pickled(folder):
        for file in folder.glob("model*"):
            file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"x")

    def stray(folder):
        file = sorted(folder.glob("*.safetensors"))[0]
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["stray.weight"] = file.name
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file(load_file(file) | {"stray.weight": torch.zeros(1)}, file)

    def adapters(folder):
        for file in folder.glob("model*"):
            file.unlink()
        (folder / "adapter_config.json").write_text("{}")

    def adapters_alone(folder):
        adapters(folder)
        (folder / "config.json").unlink()

    assert "holds adapters of peft" in case(adapters) and "merge_and_unload()" in case(adapters_alone)
    assert "has no config.json" in case(lambda folder: (folder / "config.json").unlink())
    assert "is not readable JSON" in case(lambda folder: (folder / "config.json").write_text("{"))
    assert "model_type 'llama'" in case(configure(model_type="llama"))
    # A merged QLoRA model may have whole weights and still say this; its export would be quantized at loading.
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert "quant_method 'bitsandbytes'" in case(configure(quantization_config=quantized))
    assert "1 missing key(s): lm_head.weight" in case(configure(tie_word_embeddings=False))
    assert "is not a readable safetensors file" in case(truncate)
    assert "Pickles can run code" in case(pickled)
    assert "1 key(s) that no mapping knows: stray.weight" in case(stray)
