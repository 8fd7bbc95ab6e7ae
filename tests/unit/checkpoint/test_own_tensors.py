"""``cocoa.safetensors``: what a trained checkpoint holds beyond Hugging Face's model, there and back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cocoa.checkpoint.bits import same_bits
from megatron_cocoa.checkpoint.info import read_info
from megatron_cocoa.checkpoint.own_tensors import OWN_FILE, own_tensors
from megatron_cocoa.checkpoint.stacked import StackedTensors
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.conversion.hf_to_mcore import UNKNOWN_TOKEN, convert_hf_to_mcore
from megatron_cocoa.conversion.mcore_to_hf import convert_mcore_to_hf, table_of
from tests.unit.rewritten import rewrite_checkpoint

EMBEDDING, OUTPUT = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"
DECODER = {
    "image_decoder.decoder.layers.self_attention.linear_qkv.weight": (1, 64, 32),
    "image_decoder.decoder.layers.mlp.linear_fc1.weight": (1, 112, 32),
    "image_decoder.pixel_head.weight": (384, 32),
}
DECODER_STATES = ("image_decoder.decoder.layers.self_attention.linear_qkv._extra_state/shard_0_1",)
MASK_TOKEN, VOCABULARY = 51, 52
BRIDGE_TOKEN = 50
PICTURES = {"image_size": 672, "min_image_tokens": None, "max_image_tokens": None}


@pytest.fixture
def trained(tmp_path, tiny, tied):
    """A checkpoint as stage warmup leaves it: with an image decoder, and padding rows that training has moved."""
    model = tiny.model("qwen2_5_vl", tied=tied)
    source = tiny.write(tmp_path / "source", tiny.state(model), model.config)
    convert_hf_to_mcore(source, tmp_path / "imported")

    def train(tensors):
        for name, shape in DECODER.items():
            tensors[name] = torch.randn(shape)
        tensors[EMBEDDING][[55, 60], 1] = 1
        if not tied:
            tensors[OUTPUT][57] = 2

    path = rewrite_checkpoint(tmp_path / "imported", tmp_path / "trained", train, more_states=DECODER_STATES)
    about = {"stage": "warmup", "step": 9, "mask_token_id": MASK_TOKEN, "bridge_token_id": BRIDGE_TOKEN}
    about |= {"attention": "causal", "image_placeholder": "bare", "pictures": PICTURES}
    info = json.loads((path / "cocoa.json").read_text()) | about
    (path / "cocoa.json").write_text(json.dumps(info))
    return path


def assert_same_tensors(first, second) -> None:
    with TorchDistReader(first) as a, TorchDistReader(second) as b:
        assert set(a.keys()) == set(b.keys()) and set(a.state_keys()) == set(b.state_keys())
        assert [key for key in a.keys() if not same_bits(a.read(key), b.read(key))] == []


def test_everything_comes_back(tmp_path, trained, tied):
    """Claim: on request, image decoder, mask token's row and moved padding rows lie in a file of their own, which is
    listed, and the import puts every bit, the stage, the token ids, the form and the sizes of pictures back."""
    report = convert_mcore_to_hf(trained, tmp_path / "hf", with_cocoa_tensors=True)
    (line,) = report.beside
    assert "3 tensor(s) of the image decoder" in line and f"{EMBEDDING}:mask_token_row (1, 32)" in line
    assert f"{EMBEDDING}:rows_beyond_vocabulary (9, 32)" in line and "stage warmup, step 9" in line
    assert not any("image_decoder" in said or "beyond" in said for said in report.left_out)
    own = load_file(tmp_path / "hf" / OWN_FILE)
    assert len(own) == len(DECODER) + (2 if tied else 4)
    with TorchDistReader(trained) as reader:
        assert same_bits(own[f"{EMBEDDING}:mask_token_row"], reader.read(EMBEDDING)[MASK_TOKEN:VOCABULARY])
    imported = convert_hf_to_mcore(tmp_path / "hf", tmp_path / "again")
    assert imported.own is not None and "of stage warmup" in imported.own
    assert_same_tensors(trained, tmp_path / "again")
    found, wanted = read_info(tmp_path / "again"), read_info(trained)
    # The export notes the dtype in the configuration.
    assert replace(found, hf_config=wanted.hf_config) == wanted


def test_transformers_does_not_mind_the_file(tmp_path, tiny, trained):
    """Claim: the folder is a Hugging Face model as it is without the file, also in several shards."""
    convert_mcore_to_hf(trained, tmp_path / "plain")
    convert_mcore_to_hf(trained, tmp_path / "hf", with_cocoa_tensors=True, max_shard_bytes=30_000)
    states = [tiny.classes["qwen2_5_vl"][1].from_pretrained(tmp_path / n).state_dict() for n in ("plain", "hf")]
    assert states[0].keys() == states[1].keys() and all(same_bits(states[0][n], states[1][n]) for n in states[0])


def test_a_plain_export_says_what_it_leaves_out(tmp_path, trained):
    """Claim: without the request, decoder, padding rows and the mask token's place are named as left out; the latter
    not where no stage has trained its row."""
    said = "\n".join(convert_mcore_to_hf(trained, tmp_path / "hf").left_out)
    assert "3 tensor(s) of image_decoder" in said and "2 non-zero row(s)" in said
    assert f"row {MASK_TOKEN} of the embedding is the mask token's" in said
    assert not (tmp_path / "hf" / OWN_FILE).exists()
    info = json.loads((trained / "cocoa.json").read_text()) | {"stage": "import"}
    (trained / "cocoa.json").write_text(json.dumps(info))
    assert "mask token" not in "\n".join(convert_mcore_to_hf(trained, tmp_path / "untrained").left_out)


def test_casts_reach_the_file_too(tmp_path, trained):
    """Claim: --dtype casts the file in either direction; a file of another dtype than the model is refused."""
    convert_mcore_to_hf(trained, tmp_path / "hf", with_cocoa_tensors=True, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "hf" / OWN_FILE).values()} == {torch.bfloat16}
    convert_mcore_to_hf(trained, tmp_path / "fp32", with_cocoa_tensors=True)
    (tmp_path / "hf" / OWN_FILE).write_bytes((tmp_path / "fp32" / OWN_FILE).read_bytes())
    with pytest.raises(ValueError, match=r"F32 \(.* in cocoa.safetensors"):
        convert_hf_to_mcore(tmp_path / "hf", tmp_path / "m")


def test_a_learned_temperature_stays_float32(tmp_path, tiny):
    """Claim: the temperature of a BF16 model comes back to the bit, casts of the weights included."""
    model = tiny.model("qwen2_5_vl", tied=True, dtype=torch.bfloat16)
    convert_hf_to_mcore(tiny.write(tmp_path / "source", tiny.state(model), model.config), tmp_path / "imported")
    scale = torch.tensor([3.9120230674743652])
    trained = rewrite_checkpoint(tmp_path / "imported", tmp_path / "trained", lambda t: t.update(logit_scale=scale))
    convert_mcore_to_hf(trained, tmp_path / "hf", with_cocoa_tensors=True)
    convert_hf_to_mcore(tmp_path / "hf", tmp_path / "again")
    assert_same_tensors(trained, tmp_path / "again")
    convert_mcore_to_hf(trained, tmp_path / "cast", with_cocoa_tensors=True, dtype=torch.bfloat16)
    convert_hf_to_mcore(tmp_path / "cast", tmp_path / "cast again", dtype=torch.bfloat16)
    assert_same_tensors(trained, tmp_path / "cast again")
    reports = [
        convert_mcore_to_hf(path, tmp_path / f"{path.name} in files", max_shard_bytes=30_000)
        for path in (tmp_path / "imported", trained)
    ]
    assert reports[0].files == reports[1].files, "files are filled by the size of the weights"


@pytest.mark.parametrize("token", ["mask_token_id", "bridge_token_id"])
def test_another_tokenizer_is_refused(tmp_path, trained, token):
    """Claim: a folder whose tokenizer gives the mask or the bridge another id would train on with another row."""
    convert_mcore_to_hf(trained, tmp_path / "hf", with_cocoa_tensors=True)
    info = read_info(trained)
    with (
        TorchDistReader(trained) as reader,
        own_tensors(tmp_path / "hf", table_of(trained, StackedTensors(reader))) as own,
    ):
        assert own.info(info) == own.info(replace(info, **{token: UNKNOWN_TOKEN})) == info
        with pytest.raises(ValueError, match=f"whose {token} is {getattr(info, token)}, the folder's .* gives 3"):
            own.info(replace(info, **{token: 3}))


def test_a_file_that_does_not_fit_is_refused(tmp_path, trained, tied):
    """Claim: damaged, foreign, or out of date, the file is refused with what to do, and nothing is written."""
    convert_mcore_to_hf(trained, tmp_path / "hf", with_cocoa_tensors=True)
    file = tmp_path / "hf" / OWN_FILE
    whole, tensors = file.read_bytes(), load_file(file)
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        metadata = json.loads(stream.read(length))["__metadata__"]

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            convert_hf_to_mcore(tmp_path / "hf", tmp_path / "m")
        assert not (tmp_path / "m").exists()

    save_file(tensors | {"language_model.adapter": torch.zeros(1)}, file, metadata=metadata)
    refused("has no place for: language_model.adapter")
    save_file(tensors, file, metadata={"format": "pt"})
    refused("was not written by the export, or is damaged")
    about = json.loads(metadata["cocoa"]) | {"pictures": {"image_size": "672"}}
    save_file(tensors, file, metadata=metadata | {"cocoa": json.dumps(about)})
    refused("has no place for: image_size")
    about = json.loads(metadata["cocoa"]) | {"empty_states": [*DECODER_STATES, "rerun_state_machine"]}
    save_file(tensors, file, metadata=metadata | {"cocoa": json.dumps(about)})
    refused("has no place for: rerun_state_machine")
    save_file(tensors | {f"{EMBEDDING}:mask_token_row": torch.zeros(1, 32)}, file, metadata=metadata)
    refused(f"disagree on row {MASK_TOKEN}, the mask token's")
    save_file(tensors | {f"{EMBEDDING}:rows_beyond_vocabulary": torch.zeros(9000, 32)}, file, metadata=metadata)
    refused("there is room for 2048 rows")
    file.write_bytes(whole[:-3])
    refused("may be truncated")
