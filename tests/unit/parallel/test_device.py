"""Which device a process gets, and what it may use there."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

from megatron_cocoa.parallel import device
from megatron_cocoa.parallel.device_memory import peak_memory_bytes


def test_the_cpu_serves_gloo_and_no_optional_kernels():
    """Claim: without a GPU no CUDA package is picked, whatever is installed."""
    if device.has_gpu():
        pytest.skip("asks what happens without a GPU")
    assert device.device().type == "cpu" and device.distributed_backend() == "gloo"
    assert set(device.optional_kernels().values()) == {None}
    assert peak_memory_bytes() > 0


def test_ranks_beyond_the_gpus_are_refused(monkeypatch):
    """Claim: more ranks than GPUs on a host is a message, not a crash in a collective."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RuntimeError, match="local rank 2 has no GPU: this host shows 2"):
        device.setup_device(2)


def test_ranks_keep_compiled_kernels_apart_and_on_their_host(monkeypatch, tmp_path):
    """Claim: no two ranks compile into one folder, hosts share none, and a user's own choice stays.

    Nor do they run what lies in a folder that somebody else has put there.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for name, found in (("is_available", True), ("device_count", 2), ("current_device", 0), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, found=found: found)
    monkeypatch.setattr(device, "optional_kernels", lambda: {"Transformer Engine": "2.20.2", "apex": None})
    folders = []
    for local_rank in range(2):
        monkeypatch.setenv("TRITON_CACHE_DIR", "")
        monkeypatch.delenv("TRITON_CACHE_DIR")
        device.setup_device(local_rank)
        folders.append(Path(os.environ["TRITON_CACHE_DIR"]))
    assert len(set(folders)) == 2 and {folder.parent for folder in folders} == {tmp_path / "temporary"}
    folders[0].rmdir()
    folders[0].symlink_to(tmp_path)
    folders[1].chmod(0o777)
    for local_rank, folder in enumerate(folders):
        monkeypatch.delenv("TRITON_CACHE_DIR")
        device.setup_device(local_rank)
        own = Path(os.environ["TRITON_CACHE_DIR"])
        assert own != folder and own.parent == folder.parent and own.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    device.setup_device(0)
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path)
