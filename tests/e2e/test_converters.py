"""The converters as users run them: exact through other layouts, verified, and safe to interrupt."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_cocoa.checkpoint.huggingface import HuggingFaceReader
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.conversion.mcore_to_hf import convert_mcore_to_hf
from megatron_cocoa.conversion.memory import ModelSize
from tests.e2e.converter_tools import (
    EXPORT,
    IMPORT,
    ROOT,
    SECONDS,
    environment,
    python,
    run,
    torchrun,
)
from tests.huggingface_folders import different_weights, write_model


def test_torchrun_converts_once(tmp_path):
    """Claim: under torchrun one rank writes, the others end, and --verify works there."""
    source = write_model(tmp_path / "hf")
    done = torchrun(2, IMPORT, "--hf-path", source, "--mcore-path", tmp_path / "mcore", "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done after") == 1
    done = torchrun(2, EXPORT, "--mcore-path", tmp_path / "mcore", "--hf-path", tmp_path / "back")
    assert done.returncode == 0, done.stdout + done.stderr
    assert different_weights(source, tmp_path / "back") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "mcore"]


@pytest.mark.parametrize("tool", [IMPORT, EXPORT], ids=lambda tool: tool.stem)
def test_help_teaches(tool):
    """Claim: --help shows a line to copy and what is written, without waiting for torch."""
    start = time.monotonic()
    done = python(tool, "--help")
    # Importing torch and Megatron takes longer than this on any machine; a bare interpreter a tenth.
    assert done.returncode == 0 and time.monotonic() - start < 3
    assert "examples:" in done.stdout and "what is written" in done.stdout and "--verify" in done.stdout


def start(tool: Path, source: Path, target: Path) -> subprocess.Popen:
    names = ("--hf-path", "--mcore-path") if tool is IMPORT else ("--mcore-path", "--hf-path")
    command = [sys.executable, str(tool), names[0], str(source), names[1], str(target)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_writing(process: subprocess.Popen, target: Path) -> None:
    """Until the incomplete folder is there: how long a process takes to start says nothing on a busy machine."""
    deadline = time.monotonic() + SECONDS
    while process.poll() is None and not list(target.parent.glob(f".{target.name}.*")):
        assert time.monotonic() < deadline, "the tool wrote nothing"
        time.sleep(0.001)


@pytest.mark.slow
def test_twenty_random_kills_leave_nothing_or_something_refused(tmp_path):
    """Claim: whenever a converter is killed, its target is absent or complete, and its leftover is refused."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import convert as benchmark

    hf, mcore, target = tmp_path / "hf", tmp_path / "mcore", tmp_path / "targets" / "new"
    benchmark.write_random_model(hf, "small")
    sources, readers = {IMPORT: hf, EXPORT: mcore}, {IMPORT: TorchDistReader, EXPORT: HuggingFaceReader}
    started, writing = {}, {}
    for tool, place in ((IMPORT, mcore), (EXPORT, tmp_path / "whole")):
        begin = time.monotonic()
        process = start(tool, sources[tool], place)
        wait_for_writing(process, place)
        started[tool] = time.monotonic() - begin
        while process.poll() is None and not place.exists():
            time.sleep(0.001)
        # Not until the process ends: that takes longer than the writing.
        writing[tool] = time.monotonic() - begin - started[tool]
        assert process.wait() == 0
    rng, outcomes = random.Random(0), {"absent": 0, "complete": 0, "leftover": 0}
    for attempt in range(20):
        tool = (IMPORT, EXPORT)[attempt % 2]
        process = start(tool, sources[tool], target)
        if attempt < 4:
            time.sleep(rng.uniform(0, started[tool]))
        else:
            wait_for_writing(process, target)
            time.sleep(rng.uniform(0, writing[tool]))
        process.kill()
        process.wait()
        leftovers = list(target.parent.glob(".new.*")) if target.parent.exists() else []
        for leftover in leftovers:
            with pytest.raises(ValueError, match="left behind|incomplete"):
                readers[tool](leftover)
        if target.exists() and tool is IMPORT:
            convert_mcore_to_hf(target, tmp_path / "back", overwrite=True)
            assert different_weights(hf, tmp_path / "back") == []
        elif target.exists():
            assert different_weights(hf, target) == []
        outcomes["complete" if target.exists() else "absent"] += 1
        outcomes["leftover"] += bool(leftovers)
        shutil.rmtree(target.parent, ignore_errors=True)
    print(outcomes)
    # The delays span start, writing and end: a run in which no kill hit the writing would prove nothing.
    assert outcomes["leftover"] >= 5, outcomes


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


@pytest.mark.slow
def test_full_size_model_is_verified_in_the_memory_that_is_asked_for(tmp_path):
    """Claim: --verify of the 3B shape passes in what the tool asks for, 9.6 GiB; the weights in FP32 are 14.0 GiB."""
    size = ModelSize(in_layers=3_405_242_112, outside=349_380_864, largest_layer=77_076_992, itemsize=2)
    needed = size.verify_bytes() / 2**30
    free, memory = shutil.disk_usage(tmp_path).free, psutil.virtual_memory().available / 2**30
    if free < 35e9 or memory < needed + 1:
        pytest.skip(f"needs 35 GB of disk and 11 GiB of memory: {free / 1e9:.0f} GB and {memory:.0f} GiB free")
    command = (ROOT / "benchmarks" / "convert.py", "--work-dir", tmp_path, "--shape", "3b", "--verify")
    done = run(sys.executable, *command)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["equal"] and result["parameters"] == size.num_parameters
    assert result["verify"]["peak_gib"] < needed < 9.7, result
