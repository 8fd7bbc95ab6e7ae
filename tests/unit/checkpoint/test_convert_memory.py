"""The converters ask for memory before they write or load what needs a whole fp32 model."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.conversion import memory
from megatron_cocoa.conversion import verify as verification
from megatron_cocoa.conversion.hf_to_mcore import convert_hf_to_mcore
from tests.huggingface_folders import write_model

TOOLS = Path(__file__).resolve().parents[3] / "tools"


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    saved = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = saved
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("folders")
    convert_hf_to_mcore(write_model(folder / "hf", tied=False), folder / "mcore")
    return folder / "hf", folder / "mcore"


@pytest.fixture
def little(monkeypatch, folders) -> int:
    """Free memory that is one byte short of what --verify needs."""
    found = memory.size_of_huggingface(folders[0]).verify_bytes() - 1
    monkeypatch.setattr(memory, "available_bytes", lambda: found)
    return found


def test_both_sides_count_the_same_parameters(folders):
    """Claim: the headers of either folder give the number of values, in and outside of layers; only the vocabulary's
    padding differs."""
    text = AutoConfig.from_pretrained(folders[0]).text_config
    with TorchDistReader(folders[1]) as reader:
        rows = reader.shape("language_model.output_layer.weight")[0]
    padding = 2 * (rows - text.vocab_size) * text.hidden_size
    found = memory.size_of_huggingface(folders[0])
    assert found.in_layers > found.largest_layer > 0
    assert memory.size_of_checkpoint(folders[1]) == replace(found, outside=found.outside + padding)


def test_the_needed_memory_is_that_which_was_measured():
    """Claim: an FP32 model of the 3B's size took 16.7 GiB; a tiny model is asked for little more than its weights."""
    assert 16.7 * 2**30 < memory.fp32_bytes(3_754_622_976) < 17.5 * 2**30
    assert memory.fp32_bytes(1000) == 5000


def test_verify_needs_the_bytes_on_disk_and_what_it_casts():
    """Claim: --verify of BF16 needs two bytes a parameter, four more for each outside of layers and of the largest
    layer, and a share for its work; of one gibibyte at most, which is more than was measured."""
    size = memory.ModelSize(in_layers=600, outside=300, largest_layer=100, itemsize=2)
    assert size.num_parameters == 900 and size.verify_bytes() == (2 * 900 + 4 * 400) * 5 // 4
    large = memory.ModelSize(in_layers=70 * 10**9, outside=2 * 10**9, largest_layer=10**9, itemsize=2)
    assert large.verify_bytes() == 144 * 10**9 + 12 * 10**9 + 2**30


def test_two_dtypes_of_16_bits_are_held_in_32():
    """Claim: where a layer is held wider than its weights are on disk, four bytes a parameter are asked for."""
    sizes = {"layers.0.a": 5, "embedding": 2}
    assert memory.ModelSize.of(sizes, {torch.bfloat16}).itemsize == 2
    assert memory.ModelSize.of(sizes, {torch.bfloat16, torch.float16}).itemsize == 4


@pytest.mark.parametrize("options, factor", [(("--dtype", "fp32"), 4), (("--dtype", "bf16"), 2), ((), 2)])
def test_the_wider_side_counts(tmp_path, monkeypatch, capsys, options, factor):
    """Claim: where one side has FP32 weights, --verify asks for four bytes a parameter, else for two; --verify-only
    finds that on disk."""
    source = write_model(tmp_path / "hf", tied=False, dtype=torch.bfloat16)
    size = memory.size_of_huggingface(source)
    assert size.itemsize == 2
    needed = replace(size, itemsize=factor).verify_bytes()
    into, mcore = tool("convert_hf_to_mcore"), tmp_path / "mcore"
    arguments = ["--hf-path", str(source), "--mcore-path", str(mcore), *options]
    monkeypatch.setattr(verification, "compare_forward", lambda *_, **__: [])
    monkeypatch.setattr(memory, "available_bytes", lambda: needed - 1)
    assert into.main([*arguments, "--verify"]) == 2 and not mcore.exists()
    monkeypatch.setattr(memory, "available_bytes", lambda: needed)
    assert into.main([*arguments, "--verify"]) == 0
    needed = max(needed, memory.size_of_checkpoint(mcore).verify_bytes())
    monkeypatch.setattr(memory, "available_bytes", lambda: needed - 1)
    assert into.main([*arguments, "--verify-only"]) == 2
    monkeypatch.setattr(memory, "available_bytes", lambda: needed)
    assert into.main([*arguments, "--verify-only"]) == 0


def test_verify_that_does_not_fit_writes_nothing(folders, tmp_path, little, capsys):
    """Claim: both tools refuse --verify before they write, with what is needed and found, and convert without it."""
    hf, mcore = folders
    into = tool("convert_hf_to_mcore")
    arguments = ["--hf-path", str(hf), "--mcore-path", str(tmp_path / "mcore")]
    assert into.main([*arguments, "--verify"]) == 2
    said = capsys.readouterr().err
    assert "--verify runs a model of 0.00 billion parameters in fp32 and needs about 0.0 GiB" in said
    assert "are free on this host" in said and "compare with --verify-only where there is more memory" in said
    assert not (tmp_path / "mcore").exists()
    assert into.main(arguments) == 0
    back = ["--hf-path", str(tmp_path / "hf"), "--mcore-path", str(mcore)]
    assert tool("convert_mcore_to_hf").main([*back, "--verify"]) == 2
    assert not (tmp_path / "hf").exists()


def test_a_gpu_counts_where_the_model_runs_on_it(monkeypatch):
    """Claim: with a GPU its memory is what golden vectors need, and --verify needs the host's besides."""
    monkeypatch.setattr(memory.device_memory, "free_gpu_memory_bytes", lambda: 10**6)
    monkeypatch.setattr(memory, "available_bytes", lambda: 0)
    asked = dict(what="it", instead="wait")
    memory.check_fp32_memory(10**5, **asked)
    with pytest.raises(ValueError, match="are free on this host"):
        memory.check_fp32_memory(10**5, **asked, host_bytes=1)
    with pytest.raises(ValueError, match="are free on the GPU .CUDA_VISIBLE_DEVICES= hides it"):
        memory.check_fp32_memory(10**6, **asked)
