"""--verify runs models whose layers stay in BF16 as if they were FP32, in little more than the bytes of the weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.conversion import forward
from megatron_cocoa.conversion.fp32_layers import held_dtype, run_in_fp32
from megatron_cocoa.conversion.hf_to_mcore import convert_hf_to_mcore, read_config
from megatron_cocoa.conversion.probe_inputs import make_probes
from megatron_cocoa.parallel import topology
from tests.huggingface_folders import write_model

ROOT = Path(__file__).resolve().parents[3]
MEASURE = """
import sys
from pathlib import Path
import torch
from megatron_cocoa.conversion.hf_to_mcore import convert_hf_to_mcore
from megatron_cocoa.conversion.verify import verify
from megatron_cocoa.parallel import device_memory
sys.path.insert(0, "benchmarks")
import convert as benchmark
text, vision = benchmark.SHAPES["small"]
benchmark.SHAPES["deep"] = dict(text, vocab_size=2000, intermediate_size=6144, num_hidden_layers=14), vision
folder = Path(sys.argv[1])
print("PARAMETERS", benchmark.write_random_model(folder / "hf", "deep", shard_bytes=10**8, plausible=True))
convert_hf_to_mcore(folder / "hf", folder / "mcore")
# The first forward pass, of one layer, takes what libraries load for it.
torch.nn.functional.scaled_dot_product_attention(*torch.ones(3, 1, 4, 64, 64))
before = device_memory.reset_peak_memory()
assert verify(folder / "hf", folder / "mcore", source="huggingface")
print("PEAK", device_memory.peak_memory_bytes() - before)
"""


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def folders(request, tmp_path_factory) -> tuple[Path, Path, Path]:
    """A BF16 folder, and checkpoints of it in BF16 and FP32."""
    folder = tmp_path_factory.mktemp(request.param)
    source = write_model(folder / "hf", request.param, dtype=torch.bfloat16)
    convert_hf_to_mcore(source, folder / "bf16")
    convert_hf_to_mcore(source, folder / "fp32", dtype=torch.float32)
    return source, folder / "bf16", folder / "fp32"


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(a, b) for mask in first for a, b in zip(first[mask], second[mask], strict=True))


@torch.no_grad()
def test_layers_held_in_bf16_give_the_bits_of_an_fp32_model(folders, tmp_path):
    """Claim: hidden states and logits of either model are those of the same weights in FP32 as a whole, bit for bit,
    under both masks, with and without pictures; and where a cast is verified, of rounded weights."""
    source, bf16, fp32 = folders
    architecture = QwenVLArchitecture.from_huggingface(read_config(source))
    probes = make_probes(architecture)
    plain = getattr(transformers, forward._CLASSES[architecture.model_type]).from_pretrained(
        source, dtype=torch.float32, attn_implementation="sdpa"
    )
    found = forward._run_huggingface(source, architecture, probes, None)
    for name, kind in forward._KINDS.items():
        plain.model.language_model.config.is_causal = kind is forward.MaskKind.CAUSAL
        hidden = torch.cat([forward._huggingface_hidden(plain, probe) for probe in probes])
        assert torch.equal(found[name][0], hidden) and torch.equal(found[name][1], plain.lm_head(hidden))
        assert found[name][1].dtype == torch.float32
    try:
        ours = forward._run_megatron(bf16, architecture, probes, 1, None)
        assert same(ours, forward._run_megatron(fp32, architecture, probes, 1, None))
        for parameter in plain.parameters():
            parameter.mul_(1 + 2**-10)
        plain.save_pretrained(tmp_path / "finer")
        convert_hf_to_mcore(tmp_path / "finer", tmp_path / "finer-mcore")
        rounded = plain.to(torch.bfloat16)
        rounded.save_pretrained(tmp_path / "rounded")
        convert_hf_to_mcore(tmp_path / "rounded", tmp_path / "rounded-mcore")
        for run, suffix, arguments in (
            (forward._run_huggingface, "", (architecture, probes)),
            (forward._run_megatron, "-mcore", (architecture, probes, 1)),
        ):
            finer, wanted = tmp_path / f"finer{suffix}", run(tmp_path / f"rounded{suffix}", *arguments, None)
            assert same(run(finer, *arguments, torch.bfloat16), wanted)
            assert not same(run(finer, *arguments, None), wanted)
    finally:
        topology.shutdown()


def test_a_layer_is_fp32_only_while_it_runs():
    """Claim: a layer's weights are FP32 in its own forward pass and as they were before and after; others are FP32."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    held, seen = model[0].weight.data, []
    run_in_fp32(model, [model[0]])
    model[0].register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.dtype))
    assert model(torch.ones(1, 4)).dtype == torch.float32 and seen == [torch.float32]
    assert model[0].weight.data_ptr() == held.data_ptr() and model[0].weight.dtype == torch.bfloat16
    assert model[1].weight.dtype == torch.float32


def test_what_fp32_does_not_contain_is_not_narrowed():
    """Claim: weights of one 16-bit dtype are held in it, any others in FP32."""
    assert held_dtype({torch.bfloat16}) == torch.bfloat16 and held_dtype({torch.float16}) == torch.float16
    for dtypes in ({torch.bfloat16, torch.float16}, {torch.bfloat16, torch.float32}, {torch.float64}):
        assert held_dtype(dtypes) == torch.float32


def test_verify_takes_less_than_a_model_in_fp32(tmp_path):
    """Claim: what --verify of a BF16 model adds to its process stays under the bytes of the weights in FP32; here it is
    2.7 bytes a parameter, where an FP32 model beside the mapped files that it was read from took 7.0."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    parameters, peak = (
        next(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith(word))
        for word in ("PARAMETERS", "PEAK")
    )
    print(f"{peak / parameters:.2f} bytes a parameter, {parameters / 1e6:.0f} million parameters")
    assert peak < 4 * parameters
