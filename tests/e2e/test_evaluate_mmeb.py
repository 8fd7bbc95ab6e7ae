"""The evaluation tool as processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.processes import environment
from tests.unit.exported_folders import Folders, write_exported
from tests.unit.mmeb_folders import write_small_benchmark

ROOT = Path(__file__).resolve().parents[2]
TOOL = "tools/evaluate_mmeb.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    folders = write_exported(tmp_path_factory.mktemp("mmeb"))
    write_small_benchmark(folders.root / "bench")
    return folders


def command(folders: Folders, output: Path, *more: str, model: Path | None = None, ranks: int = 1) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    bench = folders.root / "bench"
    arguments = ["--model-path", model or folders.exported, "--data-path", bench / "eval", "--image-root", bench]
    return [sys.executable, *launch, TOOL, *map(str, arguments), "--output-path", str(output), *more]


def run(arguments: list[str], *, status: int = 0) -> str:
    variables = environment(CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(arguments, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def scores(output: Path) -> dict:
    """All score files without what is about the run and not about the model."""
    found = {file.name: json.loads(file.read_text()) for file in sorted(output.glob("*_score.json"))}
    return {name: {k: v for k, v in score.items() if k != "run"} for name, score in found.items()}


def test_scores_from_the_command_line(folders, tmp_path):
    """Claim: one task gives files, a table that names what is missing, and a summary from the files alone."""
    output = tmp_path / "out"
    text = run(command(folders, output, "--tasks", "i2t", "--baselines"))
    assert "pictures keep their shape, with 3136 to 3136 pixels" in text
    assert "missing (1): t2i" in text and "1 of 2 tasks" in text
    names = {"i2t_score.json", "i2t_pred.txt", "i2t_evidence.json", "summary.json", "report.html"}
    assert {file.name for file in output.iterdir()} == names
    summary = json.loads(run([sys.executable, TOOL, "--summarize", str(output)]))
    assert summary == json.loads((output / "summary.json").read_text()) and summary["missing"] == ["t2i"]
    computed = json.loads((output / "i2t_score.json").read_text())["run"]
    assert computed["batch_size"] == 32 and computed["tensor_model_parallel_size"] == 1
    refused = run(command(folders, output, "--image-size", "56"), status=2)
    assert "settings.image_size (was 'native', is now 56)" in refused and "--overwrite" in refused


@pytest.mark.parametrize(
    "degrees",
    [
        ["tensor_model_parallel_size=2", "sequence_parallel"],
        pytest.param(["pipeline_model_parallel_size=2"], marks=pytest.mark.slow),
        pytest.param(["context_parallel_size=2"], marks=pytest.mark.slow),
    ],
    ids=lambda degrees: degrees[0],
)
@pytest.mark.parametrize("form", ["checkpoint", pytest.param("exported", marks=pytest.mark.slow)])
def test_a_model_divided_over_ranks_scores_the_same(folders, tmp_path, form, degrees):
    """Claim: a model that no rank holds whole has the score files of one rank, from an export and from a checkpoint."""
    model = getattr(folders, form)
    for output, more, ranks in (
        (tmp_path / "whole", [], 1),
        (tmp_path / "divided", [f"--parallel.{degree}" for degree in degrees], 2),
    ):
        run(command(folders, output, *more, model=model, ranks=ranks))
    assert scores(tmp_path / "divided") == scores(tmp_path / "whole")
    for name in ("i2t", "t2i"):
        first, second = ((tmp_path / form / f"{name}_pred.txt").read_text() for form in ("whole", "divided"))
        assert first == second
        cosines = [
            [c["cosine"] for kind in ("hits", "misses", "worst") for e in evidence[kind] for c in e["candidates"]]
            for evidence in (
                json.loads((tmp_path / form / f"{name}_evidence.json").read_text()) for form in ("whole", "divided")
            )
        ]
        # Rounded to four places there; sums over ranks move a cosine by 1e-6.
        assert cosines[0] and cosines[1] == pytest.approx(cosines[0], abs=2e-4)


def test_a_layout_that_does_not_fit_is_refused(folders, tmp_path):
    refused = run(command(folders, tmp_path / "x", "--parallel.tensor_model_parallel_size", "2"), status=2)
    assert "1 rank(s) cannot be divided into replicas of 2" in refused and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_ranks_change_nothing(folders, tmp_path):
    """Claim: torchrun with 1, 2 and 4 ranks writes the same files, to the last bit."""
    names = ("i2t_pred.txt", "t2i_pred.txt", "i2t_evidence.json", "t2i_evidence.json")
    found = {}
    for ranks in (1, 2, 4):
        output = tmp_path / str(ranks)
        run(command(folders, output, "--batch-size", "3", "--baselines", ranks=ranks))
        found[ranks] = scores(output), {name: (output / name).read_text() for name in names}
    assert found[1] == found[2] == found[4] and len(found[1][0]) == 2
    # Started again with other packs and ranks it keeps what is there.
    assert run(command(folders, tmp_path / "2", "--batch-size", "5", "--baselines")).count(": kept") == 2
