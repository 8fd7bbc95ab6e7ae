"""Peak memory of a step above what is there before and after it: weights, gradients, optimizer state, the batch.

On a CPU every operation's storages are counted from birth to end, which is exact where a process's resident size is
not: the C allocator keeps what was freed. On a GPU the allocator's own counter serves.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

from megatron_cocoa.parallel import device
from tests.live_bytes import LiveBytes


def peak_of_step(step: Callable[[], object]) -> int:
    """Bytes that ``step`` holds at its height beyond what stood before it.

    Gradients that the step makes and leaves count as standing: they are measured as what remains.
    """
    gc.collect()
    if device.has_gpu():
        step()
        resident = device.reset_peak_memory()
        step()
        return device.peak_memory_bytes() - resident
    with LiveBytes() as live:
        step()
        gc.collect()
        left = live.live
        live.reset_peak()
        step()
    return live.peak - left
