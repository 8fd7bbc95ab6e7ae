"""Adapters by themselves in peft's format."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close

from megatron_cocoa.checkpoint import adapter_export
from megatron_cocoa.checkpoint.adapter_export import CONFIG_FILE, WEIGHTS_FILE, export_adapters
from megatron_cocoa.checkpoint.adapter_mapping import adapter_mappings
from megatron_cocoa.checkpoint.adapter_weights import _first_copy, draw_adapters, gather_adapters
from megatron_cocoa.config import AdapterSettings
from megatron_cocoa.model.adapters import attach_adapters
from tests.parity import adapters, reference
from tests.parity.compare import relative

SOME = dict(rank=4, alpha=6.5, dropout=0.0, language_targets=("q_proj", "gate_proj"), vision_targets=("qkv", "fc2"))


def export(case, folder) -> None:
    tensors = gather_adapters(case.model.bare_chunks, case.mappings)
    export_adapters(folder, tensors, case.settings.adapter, base_model="base")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_loads_the_export_to_the_same_outputs(tiny, kind, tmp_path):
    """Claim: ``PeftModel.from_pretrained`` on Hugging Face's model takes every tensor, finds no module too many (the
    tower of Qwen2.5-VL has a gate_proj that is no target), and computes what our model computes.

    Tolerance as in test_adapters.py.
    """
    case = adapters.adapted(tiny, AdapterSettings(kind=kind, rslora=kind == "lora", **SOME))
    export(case, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(tiny.huggingface), tmp_path / "adapter")
    theirs = {name for name, _ in loaded.named_parameters() if "lora_" in name}
    saved = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    assert len(theirs) == len(saved) == sum(len(mapping.hf_names) for mapping in case.mappings)
    outputs = [reference.run_huggingface(loaded.base_model.model, s, kind=case.kind)[0] for s in case.encoded]
    assert relative(adapters.run_ours(case), torch.cat(outputs).detach()) < 2e-5


def test_pefts_own_export_holds_the_same_files(tiny, tmp_path):
    """Claim: names, shapes and values are those that peft saves for the same adapters."""
    case = adapters.adapted(tiny, AdapterSettings(kind="dora", **SOME))
    export(case, tmp_path / "ours")
    case.peft.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / WEIGHTS_FILE) for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_close(ours[name], tensor, rtol=0, atol=0, msg=name)
    wanted = json.loads((tmp_path / "theirs" / CONFIG_FILE).read_text())
    found = json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())
    assert found["base_model_name_or_path"] == "base"
    different = {key for key, value in found.items() if value != wanted[key]}
    assert different <= {"base_model_name_or_path", "inference_mode"}


def test_an_export_is_whole_or_not_there(tiny, tmp_path, monkeypatch):
    """Claim: a failure between the two files leaves the earlier export as it was, and nothing half-written."""
    case = adapters.adapted(tiny, AdapterSettings(kind="lora", **SOME))
    export(case, tmp_path / "adapter")
    before = (tmp_path / "adapter" / WEIGHTS_FILE).read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(adapter_export, "peft_config", fail)
    with pytest.raises(OSError, match="disk full"):
        export(case, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter" / WEIGHTS_FILE).read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not a folder of adapters"):
        export(case, tmp_path / "other")


def test_what_must_not_train_is_found_at_export(tiny):
    """Claim: a value in the rows of a module without an adapter is an error that names the tensor, not a loss."""
    case = adapters.adapted(tiny, AdapterSettings(kind="lora", **SOME))
    fused = case.chunk.language_model.decoder.layers[1].self_attention.linear_qkv_adapter
    with torch.no_grad():
        fused.lora_B[~fused.has_owner] = 1
    with pytest.raises(ValueError, match=r"layers\.1\.self_attention\.linear_qkv_adapter\.lora_B: .* rows that no"):
        gather_adapters(case.model.bare_chunks, case.mappings)


def test_copies_a_rounding_apart_are_one_tensor():
    """Claim: copies a rounding apart count as the first; further apart is an error with the distance."""
    copy = torch.linspace(-1, 1, 1000).bfloat16()
    rounded = (copy.float() * 1.003).bfloat16()
    assert not torch.equal(copy, rounded) and _first_copy([copy, rounded], "lora_A") is copy
    with pytest.raises(ValueError, match=r"lora_A: copies on .* \(1: 0\.1\) .* gradients were not the same"):
        _first_copy([copy, copy * 1.1], "lora_A")
    with pytest.raises(ValueError, match=r"\(0: nan, 1: nan\)"):
        _first_copy([copy * torch.nan, copy], "lora_A")
    assert not _first_copy([torch.zeros(3), torch.zeros(3)], "lora_B").any()


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_initial_values_are_distributed_as_pefts(tiny, init):
    """Claim: A is N(0, 1 / rank) or uniform within 1 / sqrt(inputs), B zero, and both follow from seed and name.

    The sample of some thousand values has a standard deviation within 3% of the distribution's.
    """
    adapter = AdapterSettings(kind="dora", rank=8, init=init)
    settings = adapters.adapter_settings(adapter)
    table = adapters.compare.name_table(tiny.huggingface.config, settings)
    mappings = adapter_mappings(table, adapter)
    drawn = []
    for seed in (1, 1, 2):
        model = adapters.bare_model(tiny, settings)
        attach_adapters(model, settings, mask_token_id=None)
        draw_adapters(model.bare_chunks, mappings, adapter, seed=seed)
        drawn.append(gather_adapters(model.bare_chunks, mappings))
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert all(torch.equal(drawn[0][key], drawn[1][key]) for key in drawn[0])
    assert not torch.equal(drawn[0][name], drawn[2][name])
    values = torch.cat([t.flatten() for n, t in drawn[0].items() if "layers" in n and t.shape == drawn[0][name].shape])
    width = drawn[0][name].shape[1]
    wanted = 1 / 8 if init == "gaussian" else (1 / width**0.5) / 3**0.5
    assert len(values) > 5000 and abs(float(values.std()) / wanted - 1) < 0.03
    assert init == "gaussian" or float(values.abs().max()) <= 1 / width**0.5
    assert not any(bool(t.any()) for n, t in drawn[0].items() if "lora_B" in n)
    lengths = tiny.huggingface.model.language_model.layers[0].self_attn.q_proj.weight.norm(dim=1)
    # A square root of a sum of squares, once by us and once by torch.
    assert_close(drawn[0]["model.layers.0.self_attn.q_proj.lora_magnitude_vector"], lengths.detach())
