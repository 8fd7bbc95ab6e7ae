"""Writing folders: bit-exact, loadable by transformers, and whole or not there at all."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Tokenizer, tokenization_utils_base, utils

from megatron_cocoa.checkpoint.bits import same_bits
from megatron_cocoa.checkpoint.export import export_huggingface
from megatron_cocoa.checkpoint.huggingface import HuggingFaceReader, check_coverage
from megatron_cocoa.checkpoint.mapping import EMBEDDING, NameTable
from megatron_cocoa.checkpoint.safetensors_stream import write_safetensors


@pytest.fixture
def megatron():
    """Unsharded Megatron tensors of a model by name."""

    def merge(table, state):
        return {m.megatron_name: m.merge([state[name] for name in m.hf_names]) for m in table}

    return merge


@pytest.fixture
def small(tmp_path, tiny, megatron):
    """A source folder, its table and its Megatron tensors."""
    state = tiny.state(tiny.model("qwen2_5_vl", tied=True))
    config = tiny.config("qwen2_5_vl", tied=True)
    source = tiny.write(tmp_path / "source", state, config)
    table = NameTable.from_config(config)
    return source, table, megatron(table, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling, max_shard_bytes", [("flat", 10**9), ("nested", 10**9), ("flat", 20_000)])
def test_folder_to_megatron_to_folder_is_bit_exact(
    tmp_path, tiny, megatron, model_type, tied, dtype, spelling, max_shard_bytes
):
    """Read from disk, merged with padding, exported: transformers loads the result and finds every bit in its place."""
    model = tiny.model(model_type, tied=tied, dtype=dtype)
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    (tmp_path / "source" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "source" / "modeling_other.py").write_text("raise SystemExit")
    table = NameTable.from_config(model.config, padded_vocab_size=64, vision_ffn_multiple=16)
    with HuggingFaceReader(tmp_path / "source") as reader:
        tensors = {mapping.megatron_name: reader.read(mapping) for mapping in table}
    told = []
    report = export_huggingface(
        tensors.__getitem__, table, tmp_path / "target", source=tmp_path / "source", names=tensors,
        spelling=spelling, max_shard_bytes=max_shard_bytes, progress=lambda done, number: told.append((done, number)),
    )  # fmt: skip
    assert told == [(done, len(tensors)) for done in range(1, len(tensors) + 1)]
    state = tiny.state(model)
    assert report.num_tensors == len(state) and report.left_out == ()
    assert report.num_bytes == sum(t.numel() * t.itemsize for t in state.values())
    assert (len(report.files) > 1) == (max_shard_bytes == 20_000)
    names = set().union(*(load_file(tmp_path / "target" / file) for file in report.files))
    assert any(name.startswith("model.visual.") for name in names) == (spelling == "nested")
    with HuggingFaceReader(tmp_path / "target") as reader:
        check_coverage(reader, table)
    loaded = tiny.classes[model_type][1].from_pretrained(tmp_path / "target", dtype="auto")
    assert loaded.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert same_bits(loaded.state_dict()[name], tensor), name
    assert (tmp_path / "target" / "tokenizer_config.json").exists()
    assert not (tmp_path / "target" / "modeling_other.py").exists()


def test_files_are_filled_up_to_the_bound(tmp_path, small):
    """Claim: what fits to the byte goes into one file, and none is larger that holds more than one Megatron tensor."""
    source, table, tensors = small
    mappings = tuple(table)
    bound = sum(tensors[mapping.megatron_name].nbytes for mapping in mappings[:5])
    report = export_huggingface(
        tensors.__getitem__, table, tmp_path / "t", source=source, dtype=torch.float32, max_shard_bytes=bound
    )
    of_name = {name: mapping.megatron_name for mapping in mappings for name in mapping.hf_names}
    files = [load_file(tmp_path / "t" / file) for file in report.files]
    assert set(files[0]) == {name for mapping in mappings[:5] for name in mapping.hf_names}
    for file in files:
        assert sum(tensor.nbytes for tensor in file.values()) <= bound or len({of_name[name] for name in file}) == 1
    index = json.loads((tmp_path / "t" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for file in files for tensor in file.values())


def test_cast_is_recorded_in_the_configuration(tmp_path, small):
    """An export to BF16 says BF16 in its config.json, so that loading does not widen it again, in each part that says a
    dtype."""
    source, table, tensors = small
    content = json.loads((source / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        content[part]["dtype"] = "float32"
    (source / "config.json").write_text(json.dumps(content))
    export_huggingface(tensors.__getitem__, table, tmp_path / "t", source=source, dtype=torch.bfloat16)
    state = load_file(tmp_path / "t" / "model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    for config in (tmp_path / "t" / "config.json", source / "config.json"):
        words = {json.loads(config.read_text()).get(key) for key in ("dtype", "torch_dtype")}
        assert ("bfloat16" in words) == (config.parent != source)
    written = json.loads((tmp_path / "t" / "config.json").read_text())
    assert [written[part]["dtype"] for part in ("text_config", "vision_config")] == ["bfloat16"] * 2


def test_what_transformers_keeps_beside_the_weights_is_copied(tmp_path, small):
    """Claim: every file in which transformers keeps tokenizer, template, processors and generation goes along."""
    source, table, tensors = small
    names = {
        utils.GENERATION_CONFIG_NAME, utils.IMAGE_PROCESSOR_NAME, utils.VIDEO_PROCESSOR_NAME, utils.PROCESSOR_NAME,
        utils.CHAT_TEMPLATE_FILE, utils.LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, *Qwen2Tokenizer.vocab_files_names.values(),
        tokenization_utils_base.TOKENIZER_CONFIG_FILE, tokenization_utils_base.SPECIAL_TOKENS_MAP_FILE,
        tokenization_utils_base.ADDED_TOKENS_FILE,
    }  # fmt: skip
    for name in names:
        (source / name).write_text(name)
    export_huggingface(tensors.__getitem__, table, tmp_path / "t", source=source)
    assert {path.name for path in (tmp_path / "t").iterdir()} == {*names, "config.json", "model.safetensors"}
    assert all((tmp_path / "t" / name).read_text() == name for name in names)


def test_own_heads_and_extra_rows_are_left_out_with_a_line(tmp_path, small):
    """What the folder cannot hold is said: image decoder, learned temperature, trained rows of vocabulary padding."""
    source, table, tensors = small
    tensors["image_decoder.proj.weight"] = torch.zeros(2)
    tensors["logit_scale"] = torch.zeros(1)
    tensors[EMBEDDING] = torch.cat([tensors[EMBEDDING], torch.zeros(4, 32)])
    tensors[EMBEDDING][53] = 1
    report = export_huggingface(tensors.__getitem__, table, tmp_path / "t", source=source, names=tensors)
    first, second = report.left_out
    assert first.startswith("2 tensor(s) of image_decoder, logit_scale have no Hugging Face counterpart")
    assert second.startswith(f"1 non-zero row(s) of {EMBEDDING} beyond the vocabulary's 52")


def test_checkpoints_that_do_not_fit_are_refused_before_writing(tmp_path, small):
    """Unknown and missing names are both listed, and no folder appears."""
    source, table, tensors = small
    names = [n for n in tensors if n != EMBEDDING] + ["language_model.adapter.weight"]
    with pytest.raises(ValueError, match=r"1 tensor\(s\) .*adapter.weight.*1 missing: .*word_embeddings"):
        export_huggingface(tensors.__getitem__, table, tmp_path / "t", source=source, names=names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_failure_leaves_nothing_new_and_keeps_what_was_there(tmp_path, small, error):
    """Half an export never appears at the target, and an old model there survives until the new one is complete."""
    source, table, tensors = small
    target = tmp_path / "t"
    export_huggingface(tensors.__getitem__, table, target, source=source)
    before = {p.name: p.read_bytes() for p in target.iterdir()}

    def fail(name):
        if name.endswith("decoder.layers.1.mlp.linear_fc1.weight"):
            raise error
        return tensors[name]

    with pytest.raises(type(error)):
        export_huggingface(fail, table, target, source=source, overwrite=True, max_shard_bytes=20_000)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "t"]


def test_existing_targets_are_replaced_only_when_asked_and_only_models(tmp_path, small):
    """No folder is lost by a slip: not without asking, not the source, not what is no model folder."""
    source, table, tensors = small
    target = tmp_path / "t"
    export_huggingface(tensors.__getitem__, table, target, source=source, max_shard_bytes=20_000)
    with pytest.raises(ValueError, match="exists: choose another target or ask to overwrite"):
        export_huggingface(tensors.__getitem__, table, target, source=source)
    with pytest.raises(ValueError, match="is the source folder itself"):
        export_huggingface(tensors.__getitem__, table, source, source=source, overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one").touch()
    with pytest.raises(ValueError, match="is not a model folder"):
        export_huggingface(tensors.__getitem__, table, tmp_path / "photos", source=source, overwrite=True)
    with pytest.raises(ValueError, match="has no config.json: needed"):
        export_huggingface(tensors.__getitem__, table, tmp_path / "u", source=tmp_path / "photos")
    export_huggingface(tensors.__getitem__, table, target, source=source, overwrite=True)
    assert sorted(p.name for p in target.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", "source", "t"]


def test_streamed_file_is_what_the_safetensors_package_reads(tmp_path):
    """Names, shapes, dtypes and bits survive, for mixed dtypes, empty tensors, scalars and non-contiguous views."""
    tensors = {
        "a": torch.randn(3, 5).T,
        "b": torch.randn(7).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "half": torch.randn(2, 2, 2).half(),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    size = write_safetensors(tmp_path / "f", tensors.items(), shapes)
    read = load_file(tmp_path / "f")
    assert set(read) == set(tensors) and all(same_bits(read[name], tensors[name]) for name in tensors)
    assert size == sum(t.numel() * t.itemsize for t in tensors.values())


def test_interrupted_stream_is_no_safetensors_file(tmp_path):
    """Tensors that differ from the announcement end the writing, and what lies there cannot be read as a model."""
    for name, sent, message in (
        ("order", [("b", torch.zeros(2)), ("a", torch.zeros(2))], "b of shape .* was not announced"),
        ("few", [("a", torch.zeros(2))], "2 tensors were announced .* 1 came"),
        ("shape", [("a", torch.zeros(3))], "a of shape .3,. was not announced"),
        ("dtype", [("a", torch.zeros(2, dtype=torch.int64))], "dtype torch.int64"),
    ):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "model.safetensors"
        with pytest.raises(ValueError, match=message):
            write_safetensors(path, sent, {"a": (2,), "b": (2,)})
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            HuggingFaceReader(path.parent)
