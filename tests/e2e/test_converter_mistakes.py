"""Whatever is wrong with a source or a disk ends in one message and status 2, and leaves both sides as they were."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cocoa.conversion import command
from megatron_cocoa.conversion import verify as verification
from megatron_cocoa.conversion.hf_to_mcore import convert_hf_to_mcore
from tests.e2e.converter_tools import EXPORT, IMPORT, python, run, torchrun
from tests.e2e.processes import full_disk_after
from tests.huggingface_folders import write_model
from tests.unit.rewritten import rewrite_checkpoint

NORM = "language_model.decoder.final_layernorm.weight"


def load_tool(script: Path):
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sides(tmp_path_factory) -> tuple[Path, Path]:
    """A model in two shards, and its checkpoint."""
    folder = tmp_path_factory.mktemp("sides")
    source = write_model(folder / "hf")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-{i + 1:05d}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, source / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    convert_hf_to_mcore(source, folder / "mcore")
    return source, folder / "mcore"


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


class Explosive:
    """A pickle that would write a file."""

    def __reduce__(self):
        return open, ("exploded", "w")


def second_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def edit(name: str, new: torch.Tensor | None) -> Callable[[Path], None]:
    """Change or remove a tensor of a folder, and its entry in the index."""

    def change(folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        file = folder / index["weight_map"][name]
        tensors = load_file(file)
        del tensors[name]
        if new is None:
            del index["weight_map"][name]
        else:
            tensors[name] = new
        save_file(tensors, file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def only_a_pickle(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")


def make_unreadable(shard: Path) -> None:
    shard.unlink()
    shard.mkdir()


BAD_FOLDERS = {
    "missing shard": (lambda f: second_shard(f).unlink(), "does not exist, and model.safetensors.index.json names it"),
    "unreadable shard": (lambda f: make_unreadable(second_shard(f)), "the folder is incomplete"),
    "truncated shard": (lambda f: os.truncate(second_shard(f), second_shard(f).stat().st_size - 7), "may be truncated"),
    "shard cut to nothing": (lambda f: os.truncate(second_shard(f), 0), "is not a readable safetensors file"),
    "missing key": (edit("model.norm.weight", None), "1 missing key(s): model.norm.weight"),
    "wrong shape": (edit("model.norm.weight", torch.zeros(63)), "model.norm.weight has (63,), needed (64,)"),
    "pickle": (only_a_pickle, "Pickles can run code"),
    "pickle called safetensors": (
        lambda f: second_shard(f).write_bytes(pickle.dumps(Explosive())),
        "is not a readable safetensors file",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), "has no config.json"),
}
CHECKPOINT_FILE = "__0_0.distcp"
BAD_CHECKPOINTS = {
    "missing file": (lambda f: (f / CHECKPOINT_FILE).unlink(), "does not exist, and .metadata names it"),
    "unreadable file": (lambda f: make_unreadable(f / CHECKPOINT_FILE), "the checkpoint is incomplete"),
    "truncated file": (lambda f: os.truncate(f / CHECKPOINT_FILE, 5000), "it may be truncated"),
    "damaged file": (
        lambda f: (f / CHECKPOINT_FILE).write_bytes(bytes((f / CHECKPOINT_FILE).stat().st_size)),
        "cannot be read as a tensor",
    ),
    "pickle for metadata": (
        lambda f: (f / ".metadata").write_bytes(pickle.dumps(Explosive())),
        f"it names {open.__module__}.open",  # io, and from Python 3.12 on _io
    ),
    "other pickle for metadata": (lambda f: (f / ".metadata").write_bytes(pickle.dumps([1])), "holds list"),
    "no metadata": (lambda f: (f / ".metadata").unlink(), "incomplete or no torch_dist checkpoint"),
}
CHANGED_CHECKPOINTS = {
    "missing key": (lambda t: t.pop(NORM), f"1 missing: ['{NORM}']"),
    "wrong shape": (lambda t: t.update({NORM: torch.zeros(63)}), f"{NORM} has shape (63,), needed (64,)"),
}


def assert_refused(tool: Path, folder: Path, message: str, capsys, monkeypatch) -> None:
    """The tool, run in this process, ends in status 2 with one line; nothing is written, the source untouched."""
    place = folder.parent
    monkeypatch.chdir(place)
    before, names = content(folder), sorted(place.iterdir())
    source, target = ("--hf-path", "--mcore-path") if tool is IMPORT else ("--mcore-path", "--hf-path")
    status = load_tool(tool).main([source, str(folder), target, str(place / "new")])
    said = capsys.readouterr()
    assert status == 2 and message in said.err, said
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and "done" not in said.out, said
    assert content(folder) == before and sorted(place.iterdir()) == names


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_ends_in_one_message(sides, tmp_path, capsys, monkeypatch, name):
    """Claim: each thing that can be wrong with a Hugging Face folder is one message and status 2; no pickle is run."""
    spoil, message = BAD_FOLDERS[name]
    folder = shutil.copytree(sides[0], tmp_path / "hf")
    spoil(folder)
    assert_refused(IMPORT, folder, message, capsys, monkeypatch)


@pytest.mark.parametrize("name", [*BAD_CHECKPOINTS, *CHANGED_CHECKPOINTS])
def test_a_bad_checkpoint_ends_in_one_message(sides, tmp_path, capsys, monkeypatch, name):
    """Claim: the same for Megatron checkpoints."""
    if name in BAD_CHECKPOINTS:
        spoil, message = BAD_CHECKPOINTS[name]
        folder = shutil.copytree(sides[1], tmp_path / "mcore")
        spoil(folder)
    else:
        change, message = CHANGED_CHECKPOINTS[name]
        folder = rewrite_checkpoint(sides[1], tmp_path / "mcore", change)
    assert_refused(EXPORT, folder, message, capsys, monkeypatch)


@pytest.mark.parametrize("depth", [".", "contrastive"])
def test_a_folder_around_a_checkpoint_names_it(sides, tmp_path, capsys, monkeypatch, depth):
    """Claim: whoever names a run or a stage is told which folder in it is the checkpoint."""
    checkpoint = shutil.copytree(sides[1], tmp_path / "run" / depth / "checkpoint")
    message = f"is a folder around checkpoints: name one of them, {checkpoint}"
    assert_refused(EXPORT, tmp_path / "run", message, capsys, monkeypatch)


@pytest.mark.parametrize("tool", [IMPORT, EXPORT], ids=lambda tool: tool.stem)
def test_a_disk_that_cannot_be_read_ends_in_one_message(sides, tmp_path, capsys, monkeypatch, tool):
    """Claim: a disk error in the middle of a file is one message, and what was written so far is removed."""
    folder = shutil.copytree(sides[0] if tool is IMPORT else sides[1], tmp_path / "source")
    read, calls = os.preadv, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) > 20:
            raise OSError(errno.EIO, "Input/output error")
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", failing)
    assert_refused(tool, folder, "Input/output error", capsys, monkeypatch)


def test_a_mistake_ends_the_process_in_status_two(sides, tmp_path):
    """Claim: the status is the process's, without a traceback."""
    source, mcore = sides
    (tmp_path / "taken").mkdir()
    cases = [
        (IMPORT, ("--hf-path", source, "--mcore-path", tmp_path / "taken"), "exists: choose another target"),
        (EXPORT, ("--mcore-path", source, "--hf-path", tmp_path / "new"), "no torch_dist checkpoint"),
    ]
    for tool, arguments, message in cases:
        done = python(tool, *arguments)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_options_that_cannot_be_meant_are_refused(sides, tmp_path, capsys):
    """Claim: an option without effect, a size that is none and a dialect that the checkpoint does not have are
    refused, and nothing is written."""
    tool, arguments = load_tool(EXPORT), ["--mcore-path", str(sides[1]), "--hf-path", str(tmp_path / "new")]
    for more, message in (
        (["--no-golden"], "--no-golden has no effect in format plain"),
        (["--image-size", "56", "--format", "sentence-transformers"], "cannot be exported for sentence-transformers"),
        (["--dialect", "megatron-bridge"], "has names of the dialect sharded, not megatron-bridge"),
        (["--format", "sentence-transformers"], "lacks tokenizer.json"),
    ):
        assert tool.main([*arguments, *more]) == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        tool.main([*arguments, "--max-shard-size", "x"])
    assert exit.value.code == 2 and "is no size" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_under_torchrun_one_rank_speaks_and_the_launch_fails(sides, tmp_path):
    """Claim: under torchrun a bad source is said once, the launch ends in failure, and nothing is written."""
    folder = shutil.copytree(sides[0], tmp_path / "hf")
    BAD_FOLDERS["truncated shard"][0](folder)
    done = torchrun(2, IMPORT, "--hf-path", folder, "--mcore-path", tmp_path / "new")
    said = done.stdout + done.stderr
    assert done.returncode != 0 and said.count("error: ") == 1 and "may be truncated" in said, said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_disk_that_fills_up_ends_in_one_message(sides, tmp_path):
    """Claim: when the system refuses a write, the tool says so with what to do, and removes what it had written."""
    source, mcore = sides

    for tool, arguments in (
        (IMPORT, ("--hf-path", source, "--mcore-path", tmp_path / "new")),
        (EXPORT, ("--mcore-path", mcore, "--hf-path", tmp_path / "new")),
    ):
        done = python(tool, *arguments, preexec_fn=full_disk_after(200_000))
        assert done.returncode == 2 and "free space or choose another place" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


def test_a_long_step_says_how_far_it_is(sides, tmp_path, monkeypatch, capsys):
    """Claim: both tools and --verify say how many tensors are done, whenever the time for a line has come."""
    hf, mcore = sides
    monkeypatch.setattr(command, "REPORT_SECONDS", 0)
    monkeypatch.setattr(verification, "compare_forward", lambda *_, **__: [])
    assert load_tool(IMPORT).main(["--hf-path", str(hf), "--mcore-path", str(tmp_path / "mcore"), "--verify"]) == 0
    said = capsys.readouterr().out
    assert load_tool(EXPORT).main(["--hf-path", str(tmp_path / "hf"), "--mcore-path", str(mcore)]) == 0
    for text, word in ((said, "converted"), (said, "compared"), (capsys.readouterr().out, "converted")):
        found = [tuple(map(int, pair)) for pair in re.findall(rf"{word}: (\d+) of (\d+) tensors after", text)]
        # An export is at its end when the last tensor is done.
        assert found == [(done, found[0][1]) for done in range(1, len(found) + 1)]
        assert found[0][1] - 1 <= len(found) <= found[0][1] and found[0][1] > 50


TERMINATED = """
import os, runpy, signal, sys
from megatron_cocoa.conversion import command
command.ProgressLines.__call__ = lambda self, done, total: done == 3 and os.kill(os.getpid(), signal.SIGTERM)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", [IMPORT, EXPORT], ids=lambda script: script.stem)
def test_a_batch_system_that_ends_a_conversion_leaves_nothing(sides, tmp_path, script):
    """Claim: SIGTERM in the middle of a conversion ends it as an interrupt does: status 2, and no half folder."""
    names = ["--hf-path", "--mcore-path"]
    source, place = (sides[0], names) if script is IMPORT else (sides[1], names[::-1])
    arguments = [script, place[0], source, place[1], tmp_path / "new" / "target"]
    done = run(sys.executable, "-c", f"import sys; sys.argv = sys.argv[1:]{TERMINATED}", *arguments)
    assert done.returncode == 2 and "error: interrupted: " in done.stderr, done.stderr
    assert list((tmp_path / "new").iterdir()) == []
