"""The launch script on a GPU in BF16: all stages with evaluation, a stop and its resume, FP8, the export's check."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cocoa.config import STAGES, ModelSettings
from megatron_cocoa.model.specs import resolve_implementation
from megatron_cocoa.parallel import device
from tests.e2e.test_launch import ROOT
from tests.e2e.test_run import train
from tests.e2e.test_survival import finish, losses, ranks_of, start, wait_for_step

pytestmark = pytest.mark.gpu

RESUMED = 0.02
"""Relative, of each later step's loss: kernels that add in no fixed order, in BF16, on a model of a few thousand
weights. A resume that lost its optimizer or its place in the data is off by far more."""

BEST_LAYERS = ["--model.transformer_impl=auto"]
"""The toy preset asks for local layers everywhere."""


@pytest.fixture(scope="module")
def finished(tiny_folders, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run") / "output"
    done = train(tiny_folders, output, *BEST_LAYERS, "--model.dtype=bf16", "--evaluate", "--validation.interval=2")
    assert done.returncode == 0, done.stdout + done.stderr
    present = device.optional_kernels()["Transformer Engine"]
    assert ("no Transformer Engine" in done.stdout) == (present is None)
    return output


def test_all_stages_run(finished):
    """Claim: three stages, checkpoints, validation and the report come out of a GPU as of a CPU."""
    for stage in STAGES:
        lines = [json.loads(line) for line in (finished / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3]
        assert all(math.isfinite(line[name]) for line in lines for name in ("loss", "grad_norm"))
        assert (finished / stage / "checkpoint" / "metadata.json").is_file()
    assert "<svg" in (finished / "report.html").read_text()


@pytest.mark.parametrize(
    "asynchronous, fp8",
    [
        ("false", []),
        ("true", []),
        ("false", ["--model.fp8=delayed"]),
        ("false", ["--model.fp8=delayed", "--model.fp8_param=true"]),
        ("false", ["--model.fp8=tensorwise", "--model.fp8_param=true"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_stopped_run_goes_on(tiny_folders, tmp_path, asynchronous, fp8):
    """Claim: stopped by SIGTERM and resumed, with the distributed optimizer, a run ends where an unbroken one ends."""
    if fp8:
        fp8_or_skip(fp8[0].partition("=")[2])
    more = [
        *BEST_LAYERS, *fp8,
        "--model.dtype=bf16", f"--checkpoint.asynchronous={asynchronous}", "--parallel.use_distributed_optimizer=true",
        "--parallel.overlap_grad_reduce=true", "--parallel.overlap_param_gather=true",
    ]  # fmt: skip
    unbroken, output = tmp_path / "unbroken", tmp_path / "output"
    assert finish(start(tiny_folders, unbroken, *more)) == 0, unbroken.with_suffix(".log").read_text()[-3000:]
    process = start(tiny_folders, output, *more)
    wait_for_step(process, output, "bridge", 4)
    (rank,) = ranks_of(process)
    rank.send_signal(signal.SIGTERM)
    assert finish(process) == 0
    assert len(losses(output, "bridge")) < len(losses(unbroken, "bridge"))
    assert finish(start(tiny_folders, output, *more)) == 0, output.with_suffix(".log").read_text()[-3000:]
    assert "bridge goes on after step" in output.with_suffix(".log").read_text()
    for stage in ("bridge", "contrastive"):
        assert losses(output, stage) == pytest.approx(losses(unbroken, stage), rel=RESUMED)


@pytest.mark.parametrize("more", [[], ["--model.fp8_vision=true"]], ids=["language", "both"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_a_run_in_fp8(tiny_folders, finished, tmp_path, recipe, more):
    """Claim: the script trains in FP8, packs padded as it needs, near what BF16 gives."""
    fp8_or_skip(recipe)
    output = tmp_path / "output"
    done = train(tiny_folders, output, *BEST_LAYERS, "--model.dtype=bf16", f"--model.fp8={recipe}", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("warmup", "bridge"):
        assert losses(output, stage) == pytest.approx(losses(finished, stage), rel=0.1)
    # Its cosines are divided by a temperature of 0.02: an error of a hundredth, which rounding weights and inputs to
    # three bits gives, moves a logit by half.
    assert losses(output, "contrastive") == pytest.approx(losses(finished, "contrastive"), abs=1.0)


def fp8_or_skip(recipe: str) -> None:
    try:
        resolve_implementation(ModelSettings(fp8=recipe))
    except ValueError as reason:
        pytest.skip(str(reason))


def test_what_a_gpu_trained_is_exported(finished, tmp_path):
    """Claim: the checkpoint becomes a Hugging Face folder that verifies, and whose golden embeddings it reproduces."""
    target = tmp_path / "exported"
    convert = ["tools/convert_mcore_to_hf.py", "--mcore-path", finished / "contrastive" / "checkpoint"]
    run(*convert, "--hf-path", target, "--format", "sentence-transformers", "--verify")
    assert "9 of 9" in run("-m", "megatron_cocoa.export.check_golden", target)


def run(*arguments) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
