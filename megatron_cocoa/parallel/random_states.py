"""This rank's random states: set from a key, read and set back, and drawn from as a tensor's layout needs.

There are three kinds: the CPU's, the GPU's, and those that Megatron tracks by name for tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import random

from megatron_cocoa.parallel import device

RandomStates = tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]
"""The CPU's, the GPU's (None without one), Megatron's tracked ones by name."""


def seed_everything(*key: int) -> None:
    """Set the default and Megatron's tracked random states of this rank from ``key``, such as seed, step and replica.

    Tensor-parallel ranks draw apart where Megatron needs them to; needs Megatron's process groups.
    """
    # Megatron adds small numbers for each rank, so neighbouring keys must not give neighbouring seeds.
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0]) & 0x7FFFFFFF
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def random_states() -> RandomStates:
    """All of this rank's random states: the CPU's, the GPU's (None without one), Megatron's tracked ones by name."""
    accelerator = torch.cuda.get_rng_state() if device.has_gpu() else None
    # The tracker replaces states and never changes them in place; its dictionary it does change.
    return torch.get_rng_state(), accelerator, dict(tensor_parallel.get_cuda_rng_tracker().get_states())


def set_random_states(states: RandomStates) -> None:
    """Go back to what ``random_states`` returned."""
    cpu, accelerator, tracked = states
    torch.set_rng_state(cpu)
    if accelerator is not None:
        torch.cuda.set_rng_state(accelerator)
    tensor_parallel.get_cuda_rng_tracker().set_states(dict(tracked))


@contextmanager
def random_state(*, differs_over_tensor_parallel: bool) -> Iterator[None]:
    """Random numbers that are drawn on the device in this context come from a state that Megatron tracks.

    Args:
        differs_over_tensor_parallel: draw apart on each tensor-parallel rank, or the same on all of them.
    """
    names = random._MODEL_PARALLEL_RNG_TRACKER_NAME, random._DATA_PARALLEL_RNG_TRACKER_NAME
    name = names[0 if differs_over_tensor_parallel else 1]
    tracker = random.get_cuda_rng_tracker()
    if device.has_gpu():
        with tracker.fork(name):
            yield
        return
    # Megatron's fork warns where the CPU's state moves, which is what has to move here.
    outside = torch.get_rng_state()
    torch.set_rng_state(tracker.states_[name])
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outside)
