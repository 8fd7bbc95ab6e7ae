"""The launch script on a GPU in BF16: all stages with evaluation, a stop and its resume, FP8, the export's check."""

import json
import math
import subprocess
import sys

import pytest

from megatron_cocoa.config import STAGES
from megatron_cocoa.parallel import device
from tests.e2e.test_launch import ROOT
from tests.e2e.test_survival import losses
from tests.gpu.runs import COMPLETE, STOPPED, parameters

pytestmark = pytest.mark.gpu

RESUMED = 0.02
"""Relative, of each later step's loss: kernels that add in no fixed order, in BF16, on a model of a few thousand
weights. A resume that lost its optimizer or its place in the data is off by far more."""


@pytest.mark.parametrize("run", ["bf16"])
def test_all_stages_run(runs, run):
    """Claim: three stages, checkpoints, validation and the report come out of a GPU as of a CPU."""
    output = runs[run].result()
    present = device.optional_kernels()["Transformer Engine"]
    assert ("no Transformer Engine" in output.with_suffix(".log").read_text()) == (present is None)
    for stage in STAGES:
        lines = [json.loads(line) for line in (output / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3]
        assert all(math.isfinite(line[name]) for line in lines for name in ("loss", "grad_norm"))
        assert (output / stage / "checkpoint" / "metadata.json").is_file()
    assert "<svg" in (output / "report.html").read_text()


@pytest.mark.parametrize("run", ["bf16"])
def test_what_a_gpu_trained_is_exported(runs, run, tmp_path):
    """Claim: the checkpoint becomes a Hugging Face folder that verifies, and whose golden embeddings it reproduces."""
    target = tmp_path / "exported"
    checkpoint = runs[run].result() / "contrastive" / "checkpoint"
    convert = ["tools/convert_mcore_to_hf.py", "--mcore-path", checkpoint, "--hf-path", target]
    python(*convert, "--format", "sentence-transformers", "--verify")
    assert "9 of 9" in python("-m", "megatron_cocoa.export.check_golden", target)


def python(*arguments) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("run", parameters(name for name in COMPLETE if name != "bf16"))
def test_a_run_in_fp8(runs, run):
    """Claim: the script trains in FP8, packs padded as it needs, near what BF16 gives."""
    output, in_bf16 = runs[run].result(), runs["bf16"].result()
    for stage in ("warmup", "bridge"):
        assert losses(output, stage) == pytest.approx(losses(in_bf16, stage), rel=0.1)
    # Its cosines are divided by a temperature of 0.02: an error of a hundredth, which rounding weights and inputs to
    # three bits gives, moves a logit by half.
    assert losses(output, "contrastive") == pytest.approx(losses(in_bf16, "contrastive"), abs=1.0)


@pytest.mark.parametrize("run", parameters(STOPPED))
def test_a_stopped_run_goes_on(runs, run):
    """Claim: stopped by SIGTERM and resumed, with the distributed optimizer, a run ends where an unbroken one ends."""
    output = runs[run].result()
    assert "bridge goes on after step" in output.with_suffix(".log").read_text()
    for stage in ("bridge", "contrastive"):
        assert losses(output, stage) == pytest.approx(losses(output.with_name("unbroken"), stage), rel=RESUMED)
