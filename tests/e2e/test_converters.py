"""The converters as users run them: exact through other layouts, verified, and safe to interrupt."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cocoa.checkpoint.convert import same_bits
from megatron_cocoa.checkpoint.huggingface import HuggingFaceReader
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.checkpoint.torch_dist_writer import TorchDistWriter
from megatron_cocoa.conversion.forward import LOGIT_BOUND
from tests.parity.reference import tiny_config, tiny_huggingface

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 900
"""Far above what any case needs: only a hang gets there."""

IMPORT, EXPORT = ROOT / "tools" / "convert_hf_to_mcore.py", ROOT / "tools" / "convert_mcore_to_hf.py"
CASES = {
    "every-tied": ("qwen2_5_vl", True, torch.bfloat16),
    "every-untied": ("qwen2_vl", False, torch.float32),
    "untied": ("qwen2_5_vl", False, torch.bfloat16),
    "tied": ("qwen2_vl", True, torch.float32),
}


def environment() -> dict[str, str]:
    """Of the outside, without a launcher's variables."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in launcher} | {"OMP_NUM_THREADS": "1"}


def run(*command: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], env=environment(), capture_output=True, text=True, timeout=SECONDS, **options
    )


def python(script: Path, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, script, *arguments, **options)


def torchrun(ranks: int, script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks)
    return run(*launcher, script, *arguments)


def write_model(folder: Path, family: str = "qwen2_5_vl", tied: bool = True, dtype=torch.float32) -> Path:
    tiny_huggingface(tiny_config(family, tied=tied), dtype=dtype).save_pretrained(folder)
    return folder


def assert_same_weights(first: Path, second: Path) -> None:
    with HuggingFaceReader(first) as a, HuggingFaceReader(second) as b:
        assert set(a.keys()) == set(b.keys())
        assert [name for name in a.keys() if not same_bits(a.get(name), b.get(name))] == []


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> tuple[Path, dict]:
    """All cases through all layouts on four ranks that are started once."""
    folder = tmp_path_factory.mktemp("layouts")
    for name, model in CASES.items():
        write_model(folder / name / "hf", *model)
    done = torchrun(4, ROOT / "tests" / "e2e" / "converter_cases.py", "--folder", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_load_at_every_layout(layouts, case):
    """Claim: Megatron loads a converted checkpoint at any TP, PP, VPP and DP with every bit, padding rows zero."""
    found = layouts[1][case]
    assert found.pop("error", None) is None, found
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
    expected = {"tp2-pp2", "resaved", "layout"}
    if case.startswith("every"):
        expected |= {"dp4", "tp4", "pp4", "pp2-vpp2", "pp2-uneven"}
    assert set(found) == expected


@pytest.mark.parametrize("case", CASES)
def test_round_trip_through_another_layout_is_bit_exact(layouts, case):
    """Claim: HF -> mcore -> load and save at TP2 x PP2 -> HF gives back every tensor, bit for bit."""
    folder, found = layouts
    assert "error" not in found[case], found[case]
    assert_same_weights(folder / case / "hf", folder / case / "back")


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, Path, str]:
    """A folder, its checkpoint, and what the tool said, ``--verify`` included."""
    folder = tmp_path_factory.mktemp("converted")
    source = write_model(folder / "hf", tied=False)
    done = python(IMPORT, "--hf-path", source, "--mcore-path", folder / "mcore", "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    return source, folder / "mcore", done.stdout


def test_verify_says_what_it_compared(converted, tmp_path):
    """Claim: --verify passes in both directions, and prints logits, cosine and top token for both masks."""
    source, mcore, said = converted
    done = python(EXPORT, "--mcore-path", mcore, "--hf-path", tmp_path / "back", "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    for text in (said, done.stdout):
        assert "105 of 105 tensors are equal bit for bit" in text
        for mask in ("causal", "bidirectional"):
            line = next(line for line in text.splitlines() if line.startswith(f"{mask}:"))
            assert "logit difference" in line and "cosine" in line and "top token agrees at 100.00%" in line
    assert_same_weights(source, tmp_path / "back")


def swap(tensors: dict[str, torch.Tensor], name: str, neighbour: str) -> None:
    tensors[name], tensors[neighbour] = tensors[neighbour].clone(), tensors[name].clone()


CORRUPTIONS = {
    "swapped": lambda t: swap(t, "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"),
    "transposed": lambda t: t.update(
        {"model.layers.2.self_attn.o_proj.weight": t["model.layers.2.self_attn.o_proj.weight"].T.contiguous()}
    ),
    "scaled": lambda t: t["visual.blocks.2.attn.proj.weight"].mul_(1.001),
}
VERIFY = """
import sys, warnings
warnings.simplefilter("ignore")
from megatron_cocoa.conversion.forward import compare_forward
from megatron_cocoa.conversion.verify import verify
for folder in sys.argv[2:]:
    lines = []
    passed = verify(folder, sys.argv[1], source="huggingface", say=lines.append)
    forward = all(a.passed for a in compare_forward(folder, sys.argv[1]))
    print("RESULT", folder.rsplit("/", 1)[1], passed, forward, lines[0].startswith("105 of 105"))
"""


def test_one_wrong_tensor_fails_both_checks(converted, tmp_path):
    """Claim: a tensor that is swapped with its neighbour, transposed or scaled by 1.001 fails the comparison of bits,
    and the forward comparison too, which does not use the name table."""
    source, mcore, _ = converted
    for name, corrupt in CORRUPTIONS.items():
        folder = shutil.copytree(source, tmp_path / name)
        tensors = load_file(folder / "model.safetensors")
        corrupt(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    folders = [source, *(tmp_path / name for name in CORRUPTIONS)]
    done = run(sys.executable, "-c", VERIFY, mcore, *folders, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    results = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert results == [["hf", "True", "True", "True"], *([name, "False", "False", "False"] for name in CORRUPTIONS)]


def test_verify_exits_with_one_where_the_checkpoint_is_wrong(converted, tmp_path):
    """Claim: the tool's exit status is that of the comparison: a wrong tensor in the checkpoint ends in 1."""
    source, mcore, _ = converted
    bad = tmp_path / "bad"
    shutil.copytree(mcore, bad, ignore=shutil.ignore_patterns("*.distcp", ".metadata", "metadata.json", "common.pt"))
    with TorchDistReader(mcore) as reader, TorchDistWriter(bad) as writer:
        for key in reader.keys():
            tensor = reader.read(key)
            if key == "language_model.decoder.layers.mlp.linear_fc2.weight":
                tensor[1] *= 1.001
            writer.write(key, tensor, shape=tensor.shape, offset=(0,) * tensor.dim())
        writer.finish()
    # The export of a wrong checkpoint equals it; compared with the source, it does not.
    done = run(sys.executable, "-c", VERIFY, bad, source, cwd=ROOT)
    assert done.stdout.split()[-4:] == ["hf", "False", "False", "False"], done.stdout + done.stderr
    assert 0 < LOGIT_BOUND <= 1e-4


def test_torchrun_converts_once(tmp_path):
    """Claim: under torchrun one rank writes, the others end, and --verify works there."""
    source = write_model(tmp_path / "hf")
    done = torchrun(2, IMPORT, "--hf-path", source, "--mcore-path", tmp_path / "mcore", "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done after") == 1
    done = torchrun(2, EXPORT, "--mcore-path", tmp_path / "mcore", "--hf-path", tmp_path / "back")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_weights(source, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "mcore"]
    again = torchrun(2, IMPORT, "--hf-path", source, "--mcore-path", tmp_path / "mcore")
    assert again.returncode != 0 and (again.stdout + again.stderr).count("error: ") == 1


def test_a_mistake_ends_in_one_message(tmp_path):
    """Claim: bad input is told in one line without a traceback, with exit status 2, and nothing is written."""
    source = write_model(tmp_path / "hf")
    (tmp_path / "taken").mkdir()
    truncated = shutil.copytree(source, tmp_path / "truncated")
    os.truncate(truncated / "model.safetensors", 1000)
    cases = [
        (IMPORT, ("--hf-path", tmp_path / "absent", "--mcore-path", tmp_path / "new"), "has no config.json"),
        (IMPORT, ("--hf-path", truncated, "--mcore-path", tmp_path / "new"), "not a readable safetensors file"),
        (IMPORT, ("--hf-path", source, "--mcore-path", tmp_path / "taken"), "exists: choose another target"),
        (EXPORT, ("--mcore-path", source, "--hf-path", tmp_path / "new"), "no torch_dist checkpoint"),
        (EXPORT, ("--mcore-path", source, "--hf-path", tmp_path / "new", "--max-shard-size", "x"), "is no size"),
    ]
    for tool, arguments, message in cases:
        done = python(tool, *arguments)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "taken", "truncated"]


def test_a_disk_that_fills_up_ends_in_one_message(tmp_path, converted):
    """Claim: when the system refuses a write, the tool says so with what to do, and removes what it had written."""
    source, mcore, _ = converted

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    for tool, arguments in (
        (IMPORT, ("--hf-path", source, "--mcore-path", tmp_path / "new")),
        (EXPORT, ("--mcore-path", mcore, "--hf-path", tmp_path / "new")),
    ):
        done = python(tool, *arguments, preexec_fn=small_files)
        assert done.returncode == 2 and "free space or choose another place" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tool", [IMPORT, EXPORT], ids=lambda tool: tool.stem)
def test_help_teaches(tool):
    """Claim: --help shows a line to copy and what is written, without waiting for torch."""
    start = time.monotonic()
    done = python(tool, "--help")
    # Importing torch and Megatron takes longer than this on any machine; a bare interpreter a tenth.
    assert done.returncode == 0 and time.monotonic() - start < 3
    assert "examples:" in done.stdout and "what is written" in done.stdout and "--verify" in done.stdout


@pytest.mark.slow
def test_twenty_random_kills_leave_nothing_or_something_refused(tmp_path):
    """Claim: whenever a converter is killed, its target is absent or complete, and its leftover is refused."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import convert as benchmark

    source = tmp_path / "hf"
    benchmark.write_random_model(source, "small")
    whole = tmp_path / "whole"
    start = time.monotonic()
    assert python(IMPORT, "--hf-path", source, "--mcore-path", whole).returncode == 0
    seconds = time.monotonic() - start
    rng, outcomes = random.Random(0), {"absent": 0, "complete": 0, "leftover": 0}
    for attempt in range(20):
        tool, arguments = EXPORT, ["--mcore-path", whole, "--hf-path"]
        if attempt % 2:
            tool, arguments = IMPORT, ["--hf-path", source, "--mcore-path"]
        target = tmp_path / "targets" / "new"
        process = subprocess.Popen(
            [sys.executable, str(tool), *map(str, arguments), str(target)], env=environment(), stdout=subprocess.DEVNULL
        )
        time.sleep(seconds * rng.uniform(0.5, 1.0))
        process.kill()
        process.wait()
        leftovers = list(target.parent.glob(".new.*")) if target.parent.exists() else []
        for leftover in leftovers:
            reader = TorchDistReader if attempt % 2 else HuggingFaceReader
            with pytest.raises(ValueError, match="left behind|incomplete"):
                reader(leftover)
        if target.exists() and attempt % 2:
            assert python(EXPORT, "--mcore-path", target, "--hf-path", tmp_path / "back", "--overwrite").returncode == 0
            assert_same_weights(source, tmp_path / "back")
        elif target.exists():
            assert_same_weights(source, target)
        outcomes["complete" if target.exists() else "absent"] += 1
        outcomes["leftover"] += bool(leftovers)
        shutil.rmtree(target.parent, ignore_errors=True)
    # The delays span start, writing and end: a run in which no kill hit the writing would prove nothing.
    assert outcomes["leftover"] > 0, outcomes


@pytest.mark.slow
def test_full_size_model_streams(tmp_path):
    """Claim: the 3B shape at full size comes back bit for bit, under 3 GiB and within three times a copy."""
    free = shutil.disk_usage(tmp_path).free
    if free < 35e9:
        pytest.skip(f"needs 35 GB of disk, {free / 1e9:.0f} GB are free")
    done = run(sys.executable, ROOT / "benchmarks" / "convert.py", "--work-dir", tmp_path, "--shape", "3b")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["equal"] and result["parameters"] == 3_754_622_976
    for direction in ("import", "export"):
        assert result[direction]["ours"]["peak_gib"] < 3 and result[direction]["ratio"] < 3, result
