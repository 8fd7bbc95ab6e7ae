"""Which device a process gets, and what it may use there."""

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
