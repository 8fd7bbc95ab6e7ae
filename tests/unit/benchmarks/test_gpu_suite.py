"""The suite that waits for a GPU: its code runs, its arithmetic is right, and a failing section stops no other."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import attention, gpu_suite
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


def test_a_precision_that_fails_leaves_the_others_their_figures(monkeypatch):
    """Claim: one recipe that does not fit costs its own row alone, and the suite's exit code."""

    def extrapolate(case, depths, points):
        if case.fp8_vision:
            raise torch.OutOfMemoryError("out of memory")
        return {"extrapolated_seconds": 1.0 if case.recipe else 2.0}

    monkeypatch.setattr(gpu_suite, "measure_step", lambda case, depth: {})
    monkeypatch.setattr(gpu_suite, "extrapolate", extrapolate)
    monkeypatch.setattr(gpu_suite.device, "optional_kernels", lambda: {"Transformer Engine": "2.20.2"})
    found = gpu_suite.SECTIONS["step_3b"](False, list(gpu_suite.FP8))
    assert found["tensorwise"]["times_bf16"] == 2.0 and "extrapolated_seconds" in found["delayed"]
    assert found["delayed, tower too"]["failed"] == "OutOfMemoryError: out of memory" and gpu_suite.has_failed(found)
    line = gpu_suite.table({"step_3b": {"delayed, tower too": found["delayed, tower too"]}})
    assert line == "step_3b delayed, tower too: FAILED: OutOfMemoryError: out of memory"


RUNNING = """
import subprocess, sys, time
print("tests/gpu/test_a.py::test_b[stopped, x] PASSED     [ 10%]")
print("tests/gpu/test_a.py::test_c[delayed, y] FAILED     [ 20%]", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(100)
"""


def test_tests_that_take_too_long_are_named_as_far_as_they_failed_and_leave_no_run(tmp_path):
    """Claim: what has failed by then is known, and no process of theirs takes the GPU from the sections after them."""
    place = tmp_path / "child"
    with pytest.raises(RuntimeError, match=r"not done after 4 s; tests/gpu/test_a.py::test_c\[delayed, y\]$"):
        gpu_suite.run_tests([sys.executable, "-c", RUNNING, str(place)], 4)
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(int(place.read_text())).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("code, outcome", [(0, "3 passed in 2s"), (1, "3 passed in 2s; tests/a.py::test_c")])
def test_what_the_tests_say_at_their_end(code, outcome):
    """Claim: the summary of a good run is kept, and the names of what failed in another."""
    printed = f"tests/a.py::test_c {'FAILED' if code else 'PASSED'} [100%]\n==== 3 passed in 2s ====\n"
    command = [sys.executable, "-c", f"print({printed!r}); raise SystemExit({code})"]
    if not code:
        assert gpu_suite.run_tests(command, 60) == outcome
        return
    with pytest.raises(RuntimeError, match=f"^{outcome}$"):
        gpu_suite.run_tests(command, 60)


@pytest.mark.parametrize(
    "message, is_refusal",
    [
        ("No available kernel. Aborting execution.", True),
        ("cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph.", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", False),
    ],
)
def test_a_dense_form_that_a_kernel_refuses_is_left_out(message, is_refusal):
    """Claim: one form without a kernel does not end the comparison, but a mistake does."""

    def run():
        raise RuntimeError(message)

    if is_refusal:
        assert not attention._fits(run)
        return
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        attention._fits(run)


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
