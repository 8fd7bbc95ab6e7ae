"""Memory of this process on its device: what it holds, what it held at most, and giving back what it no longer needs.

On a GPU that is what torch's allocator has handed out; on the CPU route, what is resident.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from megatron_cocoa.parallel import device


def release_memory() -> None:
    """Free what is no longer used. Megatron's DDP holds itself in a cycle, so its buffers wait for the collector."""
    gc.collect()
    if device.has_gpu():
        torch.cuda.empty_cache()


def memory_bytes() -> int:
    """Memory of this process now: allocated on the GPU, or resident on the CPU route."""
    if device.has_gpu():
        return torch.cuda.memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss


def peak_memory_bytes() -> int:
    """Peak memory of this process so far: allocated on the GPU, or resident on the CPU route."""
    return torch.cuda.max_memory_allocated() if device.has_gpu() else _process_memory("VmHWM")


def reset_peak_memory() -> int:
    """Let ``peak_memory_bytes`` count from now on; returns the bytes in use now, by the same measure."""
    if device.has_gpu():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _process_memory("VmRSS")


def free_gpu_memory_bytes() -> int | None:
    """Memory of this rank's GPU that no process uses; None without a GPU."""
    return torch.cuda.mem_get_info()[0] if device.has_gpu() else None


def memory_in_use() -> int | None:
    """Bytes that are taken on this rank's GPU, by whatever process; a context alone takes 0.5 GiB. None without."""
    if not device.has_gpu():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def allocation_retries() -> int:
    """How often torch's allocator had to free its cached GPU memory and try again; 0 without a GPU."""
    return torch.cuda.memory_stats().get("num_alloc_retries", 0) if device.has_gpu() else 0


def _process_memory(name: str) -> int:
    """A line of Linux's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
