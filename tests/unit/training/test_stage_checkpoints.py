"""Which checkpoints of a stage count as complete."""

import errno
import os

import pytest

from megatron_cocoa.checkpoint.writer import discard
from megatron_cocoa.recipes.resume import find_places
from megatron_cocoa.training.stage_checkpoints import StageCheckpoints, complete_steps, remove_leftovers


def make(folder, name, *files):
    (folder / name).mkdir(parents=True)
    for file in files:
        (folder / name / file).write_text("{}")


def test_only_folders_with_index_and_description_are_complete(tmp_path):
    """Claim: whatever a killed run leaves beside them is not taken for a checkpoint, in the order of steps."""
    make(tmp_path, "step-00000100", "metadata.json", "cocoa.json")
    make(tmp_path, "step-00000020", "metadata.json", "cocoa.json")
    make(tmp_path, "step-00000120.incomplete", "metadata.json", "cocoa.json")
    make(tmp_path, "step-00000110", "metadata.json")
    make(tmp_path, "step-00000112", "cocoa.json")
    make(tmp_path, "step-00000115", "metadata.json", "cocoa.json")
    (tmp_path / "step-00000115" / "cocoa.json").write_text("")
    make(tmp_path, "step-130", "metadata.json", "cocoa.json")
    assert complete_steps(tmp_path) == [20, 100]
    assert complete_steps(tmp_path / "absent") == []


@pytest.mark.parametrize(("keep", "kept"), [(1, [300]), (2, [200, 300]), (5, [20, 100, 200, 300])])
def test_the_newest_checkpoints_are_kept(tmp_path, keep, kept):
    """Claim: exactly as many as asked for stay, and an incomplete one is none of them."""
    for step in (200, 20, 300, 100):
        make(tmp_path, f"step-{step:08d}", "metadata.json", "cocoa.json")
    make(tmp_path, "step-00000400", "metadata.json")
    StageCheckpoints(tmp_path, keep=keep, asynchronous=False).wait()
    assert complete_steps(tmp_path) == kept


def test_what_cannot_be_removed_is_no_checkpoint_any_more(tmp_path, monkeypatch):
    """Claim: files that somebody still reads neither end the run nor look like a checkpoint, and go another time."""
    make(tmp_path, "step-00000100", "metadata.json", "cocoa.json")
    path = tmp_path / "step-00000100"
    monkeypatch.setattr("megatron_cocoa.checkpoint.writer.shutil.rmtree", lambda folder, ignore_errors: None)
    discard(path, path)
    discard(path, path)
    assert complete_steps(tmp_path) == [] and len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_leftovers_go_and_checkpoints_stay(tmp_path):
    make(tmp_path, "step-00000100", "metadata.json", "cocoa.json")
    make(tmp_path, "step-00000120.incomplete", "half")
    make(tmp_path, "step-00000120.0a1b2c3d.incomplete", "half")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000100"]


def test_a_write_that_is_removed_gets_no_name_any_more(tmp_path, monkeypatch):
    """Claim: a run that lives on cannot complete, while its files go one by one, what another run is removing."""
    make(tmp_path, "step-00000120.0a1b2c3d.incomplete", "metadata.json", "cocoa.json")
    tried = []

    def rmtree(folder, ignore_errors):
        with pytest.raises(FileNotFoundError):
            (tmp_path / "step-00000120.0a1b2c3d.incomplete").rename(tmp_path / "step-00000120")
        tried.append(folder.name)

    monkeypatch.setattr("megatron_cocoa.checkpoint.writer.shutil.rmtree", rmtree)
    remove_leftovers(tmp_path)
    assert len(tried) == 1
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir()), "under its new name it is still a leftover"


def test_a_checkpoint_that_cannot_be_seen_is_not_taken_for_none(tmp_path, monkeypatch):
    """Claim: while a file system fails, no run starts a stage anew over its checkpoints, nor goes back to older ones.

    A run that is under way, and only looks for old ones to remove, goes on.
    """
    steps = tmp_path / "warmup" / "checkpoints"
    make(steps, "step-00000100", "metadata.json", "cocoa.json")

    def fails(path, encoding):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.read_text", fails)
        with pytest.raises(OSError, match="Input/output error"):
            complete_steps(steps)
        with pytest.raises(ValueError, match="cannot resume the run in .*: .*Input/output error"):
            find_places(tmp_path, ["warmup"])
        StageCheckpoints(steps, keep=1, asynchronous=False).wait()
    assert complete_steps(steps) == [100]
