"""The command line tools that export a model and embed a corpus, as processes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.e2e.processes import environment
from tests.unit.exported_folders import Folders, write_exported

ROOT = Path(__file__).resolve().parents[2]
NUM_ROWS = 36


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    folders = write_exported(tmp_path_factory.mktemp("embed"))
    rows = [
        {"id": f"row {i}", "text": f"caption {i} " * (i % 5), "image": f"pairs/images/{i}.png" if i % 3 else ""}
        for i in range(1, NUM_ROWS + 1)
    ]
    for row in rows:
        row["text"] = row["text"] or ("" if row["image"] else "plain")
    # In several row groups, so that a batch of the file is not the whole of it.
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folders.root / "corpus.parquet", row_group_size=10)
    return folders


def command(folders: Folders, output: Path, *, ranks: int = 1) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    arguments = ["--model", folders.exported, "--corpus", folders.root / "corpus.parquet", "--output", output]
    # One item a pass: where a pack ends must not depend on where the run was stopped.
    return [sys.executable, *launch, "tools/embed.py", *map(str, arguments), "--shard-size", "1"]


def run(arguments: list[str]) -> str:
    variables = environment(CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(arguments, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_killed_run_goes_on_to_the_same_files(folders, tmp_path):
    """Claim: killed in the middle of a parquet corpus and started again on two ranks, the files are those of a run
    that was not stopped."""
    run(command(folders, tmp_path / "whole"))
    wanted = content(tmp_path / "whole")
    output = tmp_path / "killed"
    process = subprocess.Popen(command(folders, output), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(list(output.glob("shard-*"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len(list(output.glob("shard-*")))
    assert 3 <= finished < NUM_ROWS, f"{finished} shards were done: the kill came too early or too late"
    text = run(command(folders, output, ranks=2))
    assert text.count("pictures keep their shape, with 3136 to 3136 pixels") == 1
    assert text.count("kept\n") == finished
    assert content(output) == wanted
    vectors = np.concatenate([np.load(output / name) for name in sorted(wanted) if name.endswith(".npy")])
    ids = [json.loads((output / name).read_text())["id"] for name in sorted(wanted) if name.startswith("ids")]
    assert vectors.shape == (NUM_ROWS, 64) and ids == [f"row {i}" for i in range(1, NUM_ROWS + 1)]


def test_export_and_check_from_the_command_line(folders, tmp_path):
    """Claim: the two commands of the documentation work, and the exported files are those of the function."""
    target = tmp_path / "exported"
    arguments = ["--mcore-path", folders.checkpoint, "--hf-path", target, "--format", "sentence-transformers"]
    text = run([sys.executable, "tools/convert_mcore_to_hf.py", *map(str, arguments), "--verify"])
    assert "pictures keep their shape" in text
    assert "9 of 9" in run([sys.executable, "-m", "megatron_cocoa.export.check_golden", str(target)])
    names = {str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()}
    assert names == {str(f.relative_to(folders.exported)) for f in folders.exported.rglob("*") if f.is_file()}
