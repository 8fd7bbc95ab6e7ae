"""What a crash of the machine, or a rename that fails, leaves where a finished folder was to stand."""

from __future__ import annotations

import os

import pytest

from megatron_cocoa.checkpoint.placement import check_target, leftovers, new_folder
from megatron_cocoa.checkpoint.writer import CheckpointWriter


def put_by_converter(target):
    with new_folder(target) as work:
        (work / "inner").mkdir()
        (work / "inner" / "a").write_text("new")
        (work / "b").write_text("new")


def put_by_run(target):
    work = target.with_name("work")
    work.mkdir()
    (work / "b").write_text("new")
    CheckpointWriter()._put_in_place(target, work, {"step": 1})


@pytest.mark.parametrize("put", [put_by_converter, put_by_run])
@pytest.mark.parametrize("is_there", [False, True])
def test_what_has_its_name_is_on_the_disk(tmp_path, monkeypatch, put, is_there):
    """Claim: every file is forced to disk whole, and the names in each folder, before the folder gets its name; the
    name itself after that."""
    target = tmp_path / "t"
    if is_there:
        target.mkdir()
        (target / "old").write_text("old")
    events, fsync, rename = [], os.fsync, os.rename

    def noted_fsync(descriptor):
        found = os.fstat(descriptor)
        events.append((found.st_ino, found.st_size))
        fsync(descriptor)

    def noted_rename(source, destination):
        if os.fspath(destination) == os.fspath(target):
            events.append("named")
        rename(source, destination)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    put(target)
    monkeypatch.undo()
    before, after = events[: events.index("named")], events[events.index("named") + 1 :]
    wanted = [(p.stat().st_ino, p.stat().st_size) for p in (target, *target.rglob("*"))]
    assert len(wanted) > 2 and set(wanted) <= set(before)
    assert tmp_path.stat().st_ino in {inode for inode, _ in after}
    assert not (target / "old").exists() and [p.name for p in tmp_path.iterdir()] == ["t"]


def test_what_was_there_stays_where_the_name_cannot_be_given(tmp_path, monkeypatch):
    """Claim: an earlier folder is whole until the new one stands in its place, and gets its name back if that fails;
    one whose writer was killed in between is found under its other name."""
    put_by_converter(tmp_path / "t")
    (tmp_path / "t" / "b").write_text("old")
    rename = os.rename

    def fails(source, destination):
        if os.fspath(source).endswith(".incomplete"):
            (left,) = [path for path in leftovers(tmp_path / "t") if path.name.endswith(".replaced")]
            assert (left / "b").read_text() == "old"
            raise OSError("the server is gone")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="the server is gone"):
        put_by_converter(tmp_path / "t")
    assert (tmp_path / "t" / "b").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_folder_that_holds_the_source_is_not_replaced(tmp_path):
    """Claim: neither under its own name, nor by a link, nor as a folder around it, is what is read written over."""
    source = tmp_path / "outer" / "source"
    source.mkdir(parents=True)
    for folder in (source, source.parent):
        (folder / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(source)
    how = dict(marker="config.json", kind="model folder", overwrite=True)
    for target in (source, tmp_path / "link"):
        with pytest.raises(ValueError, match="is the source folder itself"):
            check_target(target, source, **how)
    with pytest.raises(ValueError, match="contains the source folder"):
        check_target(source.parent, source, **how)
    with pytest.raises(ValueError, match="contains the source folder"):
        check_target(source.parent, tmp_path / "link", **how)
