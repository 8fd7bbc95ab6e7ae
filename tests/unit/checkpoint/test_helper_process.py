"""The processes behind a rank's checkpoint writes."""

import contextlib
import os
import queue
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from megatron_cocoa.checkpoint import helper_process

ROOT = Path(__file__).resolve().parents[3]
RANK = """
import sys
import time
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_cocoa.checkpoint.writer import CheckpointWriter
from megatron_cocoa.config import ParallelSettings
from megatron_cocoa.parallel import topology

if __name__ == "__main__":
    topology.initialize(ParallelSettings(), topology.LaunchInfo(rank=0, world_size=1, local_rank=0), seed=0)
    FileSystemWriterAsync.write_preloaded_data = staticmethod(lambda *args, **kwargs: time.sleep(600))
    writer, state = CheckpointWriter(asynchronous=True), {"w": ShardedTensor.from_rank_offsets("w", torch.ones(4))}
    writer.write(Path(sys.argv[1]), state, content_metadata={}, info={})
    print("process", writer._process.pid, flush=True)
    time.sleep(600)
"""
"""A rank that trains while a checkpoint is written in the background."""


@pytest.fixture
def own_process(monkeypatch):
    """Leaves no process behind: other tests look at this one's children."""
    monkeypatch.setattr(helper_process, "_manager", None)
    yield
    helper_process._manager.shutdown()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_results_pass_through_a_process_without_torch(own_process):
    """Claim: what a writer puts in comes out as it was, and the process that holds it meanwhile imports no torch."""
    megatron = SimpleNamespace(_results_queue=None)
    helper_process.start_results_queue(megatron)
    results = {0: [WriteResult(MetadataIndex("weight"), 8, "of the storage")]}
    megatron._results_queue.put(results)
    mapped = Path(f"/proc/{helper_process._manager._process.pid}/maps").read_text()
    assert "python" in mapped and "torch" not in mapped
    assert megatron._results_queue.get_nowait() == results
    with pytest.raises(queue.Empty):
        megatron._results_queue.get_nowait()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end the process")
def test_a_writer_ends_with_its_rank(tmp_path):
    """Claim: the process that writes a checkpoint does not outlive a rank that is killed, however much it has to write.

    It shares the rank's open files, so that until it ends a GPU keeps the rank's memory from the one that is restarted.
    """
    script = tmp_path / "rank.py"
    script.write_text(RANK, encoding="utf-8")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    rank = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "checkpoint")],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    with rank:
        found = next((line for line in rank.stdout if line.startswith("process")), "")
        writer = psutil.Process(int(found.split()[1]))
        rank.kill()
        deadline = time.monotonic() + 20
        while lives(writer) and time.monotonic() < deadline:
            time.sleep(0.05)
        is_left = lives(writer)
        if is_left:
            writer.kill()
    assert not is_left


def lives(process: psutil.Process) -> bool:
    """Also where nobody asks how an orphan has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
