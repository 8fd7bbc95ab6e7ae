"""What every side-by-side benchmark shares: alternating timings, peak memory, and where and on what they were taken.

Both sides run in one process, one after the other and in alternating order, so that a busy machine slows both; the
ratio of each pair is taken before the median, and is reference seconds over ours: above one, ours is faster.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable

import psutil
import torch

from megatron_cocoa.parallel import device
from megatron_cocoa.parallel.device_memory import memory_in_use, peak_memory_bytes, reset_peak_memory

PACKAGES = (
    "torch",
    "transformers",
    "megatron-core",
    "transformer-engine",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "sentence-transformers",
)


def measure_pairs(
    ours: Callable[[], object],
    reference: Callable[[], object],
    *,
    repeats: int = 5,
    warmup: int = 1,
    setup: Callable[[], object] | None = None,
    calls: int = 1,
) -> dict[str, object]:
    """Time both sides in alternating order: ours first in even pairs, the reference first in odd ones.

    Args:
        ours, reference: one call is one measurement; work queued on a GPU is waited for.
        repeats: pairs that count.
        warmup: pairs before them that do not.
        setup: called before each measurement, outside of the timing.
        calls: calls per measurement, for work too short for the clock; the seconds are those of one.

    Returns:
        ``ratio``: median over pairs of reference seconds over ours; ``spread``: the least and the greatest of them;
        ``ours_seconds`` and ``reference_seconds``: medians; ``ours_spread`` and ``reference_spread``; ``pairs``.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in range(-warmup, repeats):
        order = ((ours, seconds[0]), (reference, seconds[1]))
        for side, found in order if pair % 2 == 0 else reversed(order):
            if setup is not None:
                setup()
            taken = _seconds(side, calls)
            if pair >= 0:
                found.append(taken)
    ratios = [theirs / mine for mine, theirs in zip(*seconds)]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "ours_seconds": _round(statistics.median(seconds[0])),
        "reference_seconds": _round(statistics.median(seconds[1])),
        "ours_spread": [_round(min(seconds[0])), _round(max(seconds[0]))],
        "reference_spread": [_round(min(seconds[1])), _round(max(seconds[1]))],
        "pairs": repeats,
    }


def _seconds(side: Callable[[], object], calls: int) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        side()
    wait()
    return (time.perf_counter() - start) / calls


def _round(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def wait() -> None:
    """Until the GPU, where there is one, has done what was asked of it."""
    if device.has_gpu():
        torch.accelerator.synchronize()


def kernel_seconds(call: Callable[[], object]) -> float | None:
    """What the GPU's kernels and copies take in one call, by torch's profiler; None without a GPU.

    Where a call takes much longer than this, the GPU waits for the host.
    """
    if not device.has_gpu():
        return None
    wait()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        wait()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def peak_bytes(call: Callable[[], object]) -> int:
    """Bytes that ``call`` holds at its height beyond what stood before it and what it leaves behind.

    On a GPU by the allocator's counter. On a CPU each operation's tensors are counted from birth to end: the resident
    size of a process says less, since the C allocator keeps what was freed; scratch inside of an operation is missed.
    """
    from tests.live_bytes import LiveBytes

    gc.collect()
    if device.has_gpu():
        call()
        standing = reset_peak_memory()
        call()
        return peak_memory_bytes() - standing
    with LiveBytes() as live:
        call()
        gc.collect()
        standing = live.live
        live.reset_peak()
        call()
    return live.peak - standing


def versions() -> dict[str, str]:
    """Python's and those of the packages of ``PACKAGES`` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, object]:
    """Cores and threads used, processor, memory, the GPU's name or None, and how busy the machine is right now.

    A GPU on which much memory is taken before anything has run is shared with another process, which takes time, too.
    """
    in_use = memory_in_use()
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": device.device_name(),
        "gpu_memory_in_use_gib": None if in_use is None else round(in_use / 2**30, 2),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
