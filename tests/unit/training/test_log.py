"""What a run writes stays in step with what it has done, also when it is resumed."""

import errno
import io
import json
import os
import sys
from unittest.mock import MagicMock

import pytest

from megatron_cocoa.training.log import StageLog, read_metrics
from megatron_cocoa.training.output_owner import OutputOwner


def write(folder, steps, *, done=0, **more):
    log = StageLog(folder, stage="warmup", steps=10, is_writer=True, interval=1, done=done, **more)
    for step in steps:
        log.step(step, {"loss": float(step), "skipped_steps": 0})
        if step % 2 == 0:
            log.validation(step, {"recall@1": step / 10})
    log.close()


def test_steps_that_were_lost_are_written_once(tmp_path):
    """Claim: a run that goes on from step 2 replaces the lines of steps 3 and 4, of both files."""
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [3, 4, 5], done=2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    validations = [json.loads(line)["step"] for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert validations == [2, 4]


def test_a_validation_that_was_put_off_is_written_once(tmp_path):
    """Claim: a run that goes on twice from the same stop validates its step twice, and keeps one line."""
    write(tmp_path, [1, 2, 3, 4])
    for _ in range(2):
        log = StageLog(tmp_path, stage="warmup", steps=10, is_writer=True, interval=1, done=4)
        log.validation(4, {"recall@1": 0.4})
        log.close()
    validations = [json.loads(line)["step"] for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert validations == [2, 4]


def test_a_line_that_was_cut_short_is_dropped(tmp_path):
    """Claim: a process that was killed while it wrote does not make the file unreadable."""
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    write(tmp_path, [3], done=2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_missing_logging_package_is_named(tmp_path, monkeypatch):
    """Claim: asking for Weights & Biases without the package ends in what to install."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb, or set wandb_project to null"):
        write(tmp_path, [1], wandb_project="cocoa")


def test_a_resumed_stage_goes_on_in_its_own_wandb_run(tmp_path, monkeypatch):
    """Claim: one curve for a stage, however often it was started; another for one that starts afresh."""
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for done in (0, 2, 4, 0):
        write(tmp_path, [done + 1, done + 2], done=done, wandb_project="cocoa")
    first, second, third, afresh = [call.kwargs["id"] for call in wandb.init.call_args_list]
    assert first == second == third != afresh


def test_a_step_is_on_disk_before_the_next(tmp_path):
    """Claim: a process that is killed has written every step that its last checkpoint counts."""
    log = StageLog(tmp_path, stage="warmup", steps=10, is_writer=True, interval=5)
    log.step(1, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    log.close()


def test_other_ranks_write_nothing(tmp_path):
    log = StageLog(tmp_path / "stage", stage="warmup", steps=1, is_writer=False, interval=1)
    log.step(1, {"loss": 1.0})
    log.validation(1, {"recall@1": 1.0})
    log.close()
    assert not (tmp_path / "stage").exists()


def test_a_full_disk_is_told_once(tmp_path):
    """Claim: at its first line that cannot be written the log says so, with the folder and what to do, and ends."""
    told = []
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    write(tmp_path, [1, 2, 3, 4], on_failure=told.append)
    (message,) = told
    assert f"log of stage warmup cannot be written to {tmp_path} ([Errno 28] No space left on device)" in message
    assert "free space on its disk and resume the run" in message and not (tmp_path / "validation.jsonl").exists()
    with pytest.raises(ValueError, match="No space left on device"):
        write(tmp_path, [1])


def owned_log(tmp_path, told, *, interval, **more):
    owner = OutputOwner(tmp_path)
    owner.claim()
    how = dict(stage="warmup", steps=10, is_writer=True, on_failure=told.append, check_owner=owner.check)
    return StageLog(tmp_path / "stage", interval=interval, **how, **more)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("next_line", ["step", "validation"])
def test_a_log_that_another_run_has_taken_over_is_left_alone(tmp_path, monkeypatch, next_line):
    """Claim: it says so once, where it looks next, and touches no file from then on, also when it is closed.

    Nor does it tell Weights & Biases that the run, which goes on elsewhere, has finished.
    """
    wandb, told = MagicMock(), []
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = owned_log(tmp_path, told, interval=3, wandb_project="cocoa")
    log.step(1, {"loss": 1.0})
    log.step(2, {"loss": 2.0})
    # Written by a thread.
    log.events.flush()
    OutputOwner(tmp_path).claim()
    before = files(tmp_path)
    if next_line == "step":
        log.step(3, {"loss": 3.0})
    else:
        log.validation(2, {"recall@1": 0.1})
    log.step(4, {"loss": 4.0})
    log.close()
    assert len(told) == 1 and f"another run has started in output_dir {tmp_path}" in told[0]
    assert files(tmp_path) == before and not wandb.init.return_value.finish.called


def test_a_stage_that_another_run_may_have_begun_is_not_opened(tmp_path):
    """Claim: no line is cut from the log of a stage that the run comes to after it has lost the folder."""
    told = []
    owned_log(tmp_path, told, interval=1)
    owner = OutputOwner(tmp_path)
    owner.claim()
    OutputOwner(tmp_path).claim()
    write(tmp_path / "bridge", [1, 2])
    before = files(tmp_path)
    write(tmp_path / "bridge", [1, 2], on_failure=told.append, check_owner=owner.check)
    assert len(told) == 1 and "another run has started" in told[0] and files(tmp_path) == before


def test_a_file_that_another_run_has_replaced_is_told_as_that(tmp_path):
    """Claim: where NFS refuses a line before the log has looked, nobody is sent to look for a full disk."""
    told = []
    log = owned_log(tmp_path, told, interval=10)
    log.lines.close()
    log.lines = open("/dev/full", "a", buffering=1)
    OutputOwner(tmp_path).claim()
    log.step(1, {"loss": 1.0})
    assert len(told) == 1 and "another run has started" in told[0]


def test_a_log_that_nobody_watches_gets_lines(tmp_path, capsys):
    """Claim: in a file every ``interval`` steps are one whole line; a bar would be a single one without an end."""
    log = StageLog(tmp_path, stage="warmup", steps=5, is_writer=True, interval=2)
    for step in range(1, 6):
        log.step(step, {"loss": float(step)})
    log.close()
    found = capsys.readouterr().err
    assert "\r" not in found and found.endswith("\n")
    said = [(line.split("[")[0].split()[-1], line.rpartition("loss=")[2]) for line in found.splitlines()[1:]]
    assert said == [("2/5", "2]"), ("4/5", "4]"), ("5/5", "5]")]


def test_lines_that_nobody_takes_end_no_run(tmp_path, monkeypatch):
    """Claim: the files are written to the end where the printed lines meet a full disk, or a pipe that is gone."""

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stderr", Full())
    log = StageLog(tmp_path, stage="warmup", steps=2, is_writer=True, interval=1)
    log.step(1, {"loss": 1.0})
    log.skipped(1, "its norm stands out")
    log.step(2, {"loss": 2.0})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
