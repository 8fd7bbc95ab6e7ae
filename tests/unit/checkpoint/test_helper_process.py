"""The process behind a rank's checkpoint writes."""

import queue
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from megatron_cocoa.checkpoint import helper_process


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
