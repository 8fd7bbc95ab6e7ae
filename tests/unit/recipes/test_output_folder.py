"""Which output folders a run may take."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_cocoa.config import TrainSettings
from megatron_cocoa.parallel.topology import LaunchInfo
from megatron_cocoa.recipes import run
from megatron_cocoa.recipes.output_folder import JOB_FILE, check_output, clear_output
from megatron_cocoa.settings.saved import save_settings
from megatron_cocoa.training.output_owner import STARTS_FILE, OutputOwner


@pytest.fixture
def output(tmp_path):
    """What a run leaves that ended before its first step."""
    output = tmp_path / "run"
    (output / "warmup" / "tensorboard").mkdir(parents=True)
    (output / "warmup" / "tensorboard" / "events.out.tfevents.1").write_bytes(b"\0" * 88)
    (output / "warmup" / "metrics.jsonl").write_text("")
    (output / JOB_FILE).write_text("12")
    OutputOwner(output).claim()
    save_settings(TrainSettings(seed=3), output / "settings.yaml")
    return output


@pytest.mark.parametrize("given", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_start_that_took_no_step_holds_no_folder(output, given):
    """Claim: the corrected command runs in the same folder, whether it resumes or not, and twice if need be.

    Until it takes the folder it leaves everything: a start that lives there, and has no step yet, goes on with it.
    """
    settings = TrainSettings(output_dir=str(output), **given)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    for _ in range(2):
        assert not check_output(settings), "a resume would be refused under other settings"
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before
    clear_output(settings)
    assert [path.name for path in output.iterdir()] == [STARTS_FILE], "whoever made that start may still look at it"


@pytest.mark.parametrize("given", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_disk_that_was_full_holds_no_folder(tmp_path, monkeypatch, given):
    """Claim: once there is room again the same command starts, whatever a full disk or a kill has left half written."""
    settings = TrainSettings(output_dir=str(tmp_path), **given)
    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(ValueError, match="cannot be written: .* free space"):
            check_output(settings)
    assert list(tmp_path.iterdir()) == []
    for name in (".write-test", ".settings.yaml.incomplete"):
        (tmp_path / name).write_text("half")
    assert not check_output(settings)
    clear_output(settings)
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_is_overtaken_while_it_clears_the_folder_leaves_it(output, monkeypatch):
    """Claim: of two starts that overwrite one run, the settings of the one that has the folder stay."""

    def clear_slowly(settings: TrainSettings) -> None:
        clear_output(settings)
        OutputOwner(output).claim()
        save_settings(TrainSettings(seed=5), output / "settings.yaml")

    monkeypatch.setattr(run, "clear_output", clear_slowly)
    context = SimpleNamespace(output=output, settings=TrainSettings(output_dir=str(output)), owner=OutputOwner(output))
    with pytest.raises(ValueError, match="another run has started"):
        run._claim_output(context, LaunchInfo(rank=0, world_size=1, local_rank=0), is_resumed=False)
    assert "seed: 5" in (output / "settings.yaml").read_text() and not (output / JOB_FILE).exists()


@pytest.mark.parametrize(
    "left",
    ["warmup/checkpoint/metadata.json", "warmup/metrics.jsonl", "warmup/notes.txt", "report.html", "thesis.tex"],
)
def test_what_cost_a_step_or_is_not_ours_holds_the_folder(output, left):
    """Claim: beside a checkpoint, a line of metrics, a report or somebody's own file nothing is begun or removed."""
    (output / left).parent.mkdir(exist_ok=True)
    (output / left).write_text("{}\n")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(ValueError, match="holds an earlier run: name another --output_dir"):
        check_output(TrainSettings(output_dir=str(output)))
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_a_folder_without_a_run_is_not_called_one(tmp_path):
    """Claim: nobody is told that --overwrite would remove a folder of other things, which it would not."""
    (tmp_path / "thesis.tex").write_text("")
    for given in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ValueError, match="holds no settings.yaml of an earlier run: .* name another --output_dir"):
            check_output(TrainSettings(output_dir=str(tmp_path), **given))


def test_a_missing_logging_package_is_found_before_the_folder_is_taken(tmp_path, monkeypatch):
    """Claim: Weights & Biases without its package is refused at the start, not once the model is loaded."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb, or set wandb_project to null"):
        check_output(TrainSettings(output_dir=str(tmp_path / "run"), wandb_project="cocoa"))
    assert not (tmp_path / "run").exists()
