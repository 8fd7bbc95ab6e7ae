"""The suite that waits for a GPU: its code runs, its arithmetic is right, and a failing section stops no other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu_steps import Depth, StepCase, extrapolate

ROOT = Path(__file__).resolve().parents[3]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tiny mode is for machines without a GPU")


@without_gpu
def test_the_suite_runs_in_tiny_mode_and_claims_nothing(tmp_path):
    """Claim: every section runs from its command on a CPU, and no utilisation or GPU is reported."""
    output = tmp_path / "suite.json"
    # Of the two shapes one: their tiny forms are the same.
    sections = [name for name in gpu_suite.SECTIONS if name != "step_7b"]
    script = str(ROOT / "benchmarks" / "gpu_suite.py")
    command = [sys.executable, script, "--tiny", "--output", str(output), "--sections", *sections]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert found["tiny"] and found["gpu"] is None and list(found["results"]) == sections
    row = found["results"]["step_3b"]["fp32"]
    assert row["mfu"] is None and row["useful_flops"] > 0
    assert [(len(point["each"]), point["allocation_retries"]) for point in row["measured"]] == [(1, 0)] * 3
    assert row["measured"][0]["kernel_seconds"] is None and found["hardware"]["gpu_memory_in_use_gib"] is None
    assert all(point["planned_peak_bytes"] and point["planned_standing_bytes"] for point in row["measured"])
    assert "absent" in found["results"]["step_3b"]["delayed"]
    assert [row["n"] for row in found["results"]["attention"]["results"]] == [32, 48]
    assert "no number below says anything about a GPU" in done.stdout


@without_gpu
def test_without_a_gpu_nothing_is_measured():
    """Claim: the suite refuses a CPU rather than print a CPU's numbers."""
    with pytest.raises(SystemExit, match="there is no GPU"):
        gpu_suite.main([])


def test_a_failing_section_is_recorded_and_the_others_run(monkeypatch):
    """Claim: the message of a failure is kept and shown, and what comes after it still runs."""

    def broken(tiny, recipes):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_suite, "SECTIONS", {"correctness": broken, "step_3b": lambda tiny, recipes: {}})
    results = dict(gpu_suite.run_sections(["correctness", "step_3b"], True, []))
    assert results["correctness"]["failed"] == "RuntimeError: out of memory" and "failed" not in results["step_3b"]
    assert "correctness: FAILED: RuntimeError: out of memory" in gpu_suite.table(results)


def test_whole_models_cost_is_that_of_their_layers():
    """Claim: a cost that is linear in the depths is found again at the published ones."""
    cost = lambda d: 5.0 + 2.0 * d.language + 3.0 * d.vision  # noqa: E731
    depths = Depth.cut("3b")
    points = [{"seconds": cost(d), "peak_bytes": cost(d) * 7} for d in depths]
    found = extrapolate(StepCase("small", None, True), depths, points)
    wanted = cost(Depth(found["layers"], found["vision_layers"]))
    assert found["extrapolated_seconds"] == pytest.approx(wanted)
    assert found["extrapolated_peak_bytes"] == pytest.approx(7 * wanted)


def test_the_table_shows_how_busy_the_kernels_were():
    """Claim: a step that the host holds up is seen in the table, and without a GPU nothing is said of it."""
    row = {"extrapolated_seconds": 4.0, "extrapolated_peak_bytes": 2**30, "layers": 36, "vision_layers": 32, "mfu": 0.4}
    points = [{"seconds": 2.0, "kernel_seconds": 0.9}, {"seconds": 1.0, "kernel_seconds": 0.98}]
    assert "kernels run 45% to 98% of the time" in gpu_suite.table({"step_3b": {"bf16": {**row, "measured": points}}})
    points = [{"seconds": 2.0, "kernel_seconds": None}]
    assert "kernels" not in gpu_suite.table({"step_3b": {"fp32": {**row, "measured": points}}})
