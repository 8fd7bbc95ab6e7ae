"""Reading folders: every form on disk gives the same tensors, and nothing damaged or left over passes unnoticed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_cocoa.checkpoint.bits import same_bits
from megatron_cocoa.checkpoint.huggingface import HuggingFaceReader, check_coverage
from megatron_cocoa.checkpoint.mapping import NameTable

INDEX = "model.safetensors.index.json"


@pytest.fixture
def state(tiny):
    return tiny.state(tiny.model("qwen2_5_vl", tied=False, dtype=torch.bfloat16))


@pytest.fixture
def table(tiny):
    return NameTable.from_config(tiny.config("qwen2_5_vl", tied=False))


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("spelling", ["flat", "nested"])
def test_every_form_on_disk_reads_alike(tmp_path, tiny, state, table, spelling, num_files):
    """Both spellings, single and sharded: the same names, shapes, dtypes and bits."""
    path = tiny.write(tmp_path / "model", state, spelling=spelling, num_files=num_files)
    with HuggingFaceReader(path) as reader:
        assert set(reader.keys()) == set(state)
        assert check_coverage(reader, table).ignored == {}
        for name, tensor in state.items():
            assert reader.shape(name) == tuple(tensor.shape) and reader.dtype(name) == "BF16"
            assert same_bits(reader.get(name), tensor)


@pytest.mark.parametrize("shard", [None, "20KB"])
def test_folders_that_transformers_saves_are_covered(tmp_path, tiny, model_type, tied, shard):
    """save_pretrained's own output is read whole, sharded or not, tied or not."""
    model = tiny.model(model_type, tied=tied)
    model.save_pretrained(tmp_path, **({} if shard is None else {"max_shard_size": shard}))
    table = NameTable.from_config(model.config)
    with HuggingFaceReader(tmp_path) as reader:
        assert (tmp_path / INDEX).exists() == (shard is not None)
        assert set(check_coverage(reader, table).mapped) == set(table.hf_shapes)
        for mapping in table:
            assert reader.read(mapping).shape == mapping.megatron_shape
        for name, tensor in tiny.state(model).items():
            assert same_bits(reader.get(name), tensor)


def test_a_model_saved_without_its_head_is_covered_where_it_needs_none(tmp_path, tiny, model_type, tied):
    """What AutoModel saves is read whole; an untied head that it lacks is asked for, with the ways out."""
    model = tiny.model(model_type, tied=tied)
    model.model.save_pretrained(tmp_path)
    with HuggingFaceReader(tmp_path) as reader:
        for name, tensor in tiny.state(model).items():
            assert name == "lm_head.weight" or same_bits(reader.get(name), tensor)
        table = NameTable.from_config(model.config)
        if tied:
            assert set(check_coverage(reader, table).mapped) == set(table.hf_shapes)
        else:
            with pytest.raises(ValueError, match="1 missing key.s.: lm_head.weight. .* tie_word_embeddings true"):
                check_coverage(reader, table)


def test_rotary_buffers_and_an_equal_tied_head_are_ignored_with_a_reason(tmp_path, tiny):
    """Known leftovers are accounted for, not errors; a tied head that differs is one."""
    table = NameTable.from_config(tiny.config("qwen2_5_vl", tied=True))
    state = tiny.state(tiny.model("qwen2_5_vl", tied=True))
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    reader = HuggingFaceReader(tiny.write(tmp_path / "equal", state))
    ignored = check_coverage(reader, table).ignored
    assert set(ignored) == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"} and all(ignored.values())
    state["lm_head.weight"][3, 1] += 1
    reader = HuggingFaceReader(tiny.write(tmp_path / "other", state))
    with pytest.raises(ValueError, match="lm_head.weight that differs .* set tie_word_embeddings to false"):
        check_coverage(reader, table)


def test_weights_in_fp8_are_told(tmp_path, tiny, state):
    """Claim: a quantized folder without a quantization_config is called quantized, not damaged."""
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(ValueError) as error:
        HuggingFaceReader(tiny.write(tmp_path / "model", state))
    assert "holds 1 tensor(s) quantized to FP8 (first: model.norm.weight, F8_E4M3)" in str(error.value)
    assert "damaged" not in str(error.value)


def test_unknown_missing_and_misshapen_keys_are_listed(tmp_path, tiny, state, table):
    """Every kind of misfit is in one message, with shapes found and needed, and at most twenty names of a kind."""
    missing = state.pop("model.norm.weight")
    state["visual.merger.mlp.2.bias"] = torch.zeros(33)
    state.update({f"extra.{i:02d}": missing for i in range(23)})
    reader = HuggingFaceReader(tiny.write(tmp_path / "model", state))
    with pytest.raises(ValueError) as error:
        check_coverage(reader, table)
    message = str(error.value)
    assert "23 key(s) that no mapping knows: extra.00, " in message and "extra.19 and 3 more" in message
    assert "extra.20" not in message
    assert "1 missing key(s): model.norm.weight" in message
    assert "visual.merger.mlp.2.bias has (33,), needed (32,)" in message


def test_an_untied_model_without_its_head_is_refused(tmp_path, tiny, state, table):
    """The head is not replaced by the embedding behind the user's back."""
    del state["lm_head.weight"]
    reader = HuggingFaceReader(tiny.write(tmp_path / "model", state))
    with pytest.raises(ValueError, match="1 missing key.s.: lm_head.weight"):
        check_coverage(reader, table)


def test_one_tensor_under_both_spellings_is_refused(tmp_path, tiny, state):
    """Which of the two is meant cannot be known."""
    for number, (name, other) in enumerate([
        # A file lists its tensors by name: the flat spelling comes last, then first.
        ("visual.merger.ln_q.weight", "model.visual.merger.ln_q.weight"),
        ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
    ]):  # fmt: skip
        path = tiny.write(tmp_path / f"model{number}", state | {other: torch.zeros_like(state[name])})
        with pytest.raises(ValueError, match=f"holds {name} twice"):
            HuggingFaceReader(path)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_files_are_refused(tmp_path, tiny, state, keep):
    """A copy that stopped early is found at opening: empty, inside of the header or the data, one byte short."""
    path = tiny.write(tmp_path / "model", state)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{file.stat().st_size} bytes. is not a readable safetensors file"):
        HuggingFaceReader(path)


@pytest.mark.parametrize("file", ["../m.safetensors", "/etc/m.safetensors", "a\\b.safetensors", "weights.bin", 3])
def test_index_that_leaves_its_folder_is_refused(tmp_path, tiny, state, file):
    """An index is data from elsewhere: it may only name safetensors files beside itself."""
    path = tiny.write(tmp_path / "model", state, num_files=2)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="places model.norm.weight in .*beside it"):
        HuggingFaceReader(path)


def test_index_and_shards_must_agree(tmp_path, tiny, state):
    """A shard that is absent, lacks a tensor, or holds one that the index does not know is refused by name."""
    path = tiny.write(tmp_path / "model", state, num_files=2)
    shard = path / "model-00002-of-00002.safetensors"
    names = [n for n, f in json.loads((path / INDEX).read_text())["weight_map"].items() if f == shard.name]
    shard.unlink()
    with pytest.raises(ValueError, match="does not exist, and model.safetensors.index.json names it"):
        HuggingFaceReader(path)
    save_file({name: state[name].clone() for name in names[1:]} | {"stray": torch.zeros(1)}, shard)
    with pytest.raises(ValueError, match=f"1 missing from the file: {names[0]}; 1 not in the index: stray"):
        HuggingFaceReader(path)
    save_file({name: state[name].clone() for name in names} | {"stray": torch.zeros(1)}, shard)
    with pytest.raises(ValueError, match="0 missing from the file; 1 not in the index: stray"):
        HuggingFaceReader(path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_damaged_index_is_refused(tmp_path, text):
    """Broken JSON and JSON of another kind end in one message."""
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match="is not a safetensors index"):
        HuggingFaceReader(tmp_path)


def test_pickles_are_refused_with_the_way_to_convert(tmp_path):
    """Pickles run code: the message says what to do instead."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ValueError, match="pytorch_model.bin but no safetensors.*save_pretrained"):
        HuggingFaceReader(tmp_path)


def test_folders_without_or_with_two_sets_of_weights_are_refused(tmp_path, tiny, state):
    """Absent, ambiguous and unfinished weights each end in a message of their own."""
    with pytest.raises(ValueError, match="is not a folder"):
        HuggingFaceReader(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds neither"):
        HuggingFaceReader(tmp_path)
    path = tiny.write(tmp_path / "model", state)
    (path / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="holds both"):
        HuggingFaceReader(path)
    with pytest.raises(ValueError, match="did not finish"):
        HuggingFaceReader(tiny.write(tmp_path / ".model.1.incomplete", state))


def test_unknown_name_is_an_error_with_the_name(tmp_path, tiny, state):
    """A mistyped name says so."""
    reader = HuggingFaceReader(tiny.write(tmp_path / "model", state))
    with pytest.raises(ValueError, match="holds no tensor model.nrm.weight"):
        reader.get("model.nrm.weight")


def test_shards_behind_links_are_read(tmp_path, tiny, state):
    """The Hugging Face cache links each file of a snapshot to a store beside it: only names are judged."""
    path = tiny.write(tmp_path / "model", state)
    (path / "model.safetensors").rename(tmp_path / "blob")
    (path / "model.safetensors").symlink_to("../blob")
    assert set(HuggingFaceReader(path).keys()) == set(state)
