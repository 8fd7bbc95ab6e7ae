"""The benchmarks of training run, compare what they say, and print what they promise. No speed is tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.processes import environment

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--layers=2", "--vision-layers=2", "--samples=2")


def run(script: str, *arguments: str) -> dict:
    """The JSON line of a benchmark; fails with its messages if it failed."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_training_steps_beside_hugging_faces():
    """Claim: on the same weights and samples every stage has the reference's loss, before and after an update (the
    script stops where it does not), and ours computes and keeps less."""
    found = run("train_step.py", *TINY, "--image-size=56", "--repeats=1", "--distributions=short", "--threads=1")
    stages = {result["stage"]: result for result in found["results"]}
    assert list(stages) == ["warmup", "bridge", "contrastive"]
    for result in stages.values():
        assert len(result["losses_and_norms"]) == 2 and result["ratio"] > 0
        assert result["useful"] >= 1 and result["tokens"] <= result["padded_tokens"]
        assert result["efficiency"] == pytest.approx(result["ratio"] / result["useful"], abs=2e-3)
        assert result["memory_ratio"] < 1


@pytest.mark.slow
def test_growth_counts_and_draws(tmp_path):
    """Claim: the sum of squares tells many samples from one of as many tokens, and the drawing holds every length."""
    found = run(
        "growth.py", "--layers=1", "--lengths", "256", "512", "--repeats=1", "--host-samples=1", "--host-image-size=56",
        f"--output={tmp_path / 'growth.svg'}",
    )  # fmt: skip
    squares = {(point["series"], point["tokens"]): point["sum_of_squares"] for point in found["points"]}
    assert squares == {("many", 256): 2**16, ("many", 512): 2**17, ("one", 256): 2**16, ("one", 512): 2**18}
    assert found["host"]["least_pack_seconds"] > 0 and len(found["fit"]["relative_errors"]) == 4
    assert ">512</text>" in (tmp_path / "growth.svg").read_text()


@pytest.mark.slow
def test_parallel_layouts_agree_with_one_process():
    """Claim: each layout has the lone process's loss (the script stops where it has not), and its account adds up."""
    found = run(
        "parallel.py", "--layers=2", "--vision-layers=2", "--samples=4", "--microbatches=2", "--image-size=56",
        "--repeats=1", "--steps=1",
    )  # fmt: skip
    assert list(found["layouts"]) == ["tp2", "tp2-sp", "pp2", "dp2"]
    for result in found["layouts"].values():
        account = result["account"]
        assert account["useful"] + account["more_compute"] + account["idle"] == pytest.approx(1, abs=3e-3)
        assert 0 < account["useful"] < 1.5 and account["imbalance"] >= 0 and 0 <= account["in_collectives"] < 1
