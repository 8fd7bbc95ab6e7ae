"""Whether a whole FP32 model fits into memory, asked before anything is written or loaded."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_cocoa.checkpoint.huggingface import HuggingFaceReader
from megatron_cocoa.checkpoint.stacked import StackedTensors
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.parallel import device_memory
from megatron_cocoa.parallel.host_memory import available_bytes

LARGEST_EXTRA = 3 * 2**30
"""What a process was measured to take beside the weights of a large model, at least; see docs/results.md."""


def fp32_bytes(num_parameters: int) -> int:
    """Memory of a process that runs a model of so many parameters in FP32: the weights, and a share for its work."""
    weights = 4 * num_parameters
    return weights + min(weights // 4, LARGEST_EXTRA)


def parameters_of_huggingface(folder: str | Path) -> int:
    """Values in the tensors of a model folder, by its headers.

    Raises:
        ValueError: if it cannot be read.
    """
    with HuggingFaceReader(folder) as reader:
        return sum(math.prod(reader.shape(name)) for name in reader.keys())


def parameters_of_checkpoint(checkpoint: str | Path) -> int:
    """Values in the weights of a Megatron checkpoint, by its metadata.

    Raises:
        ValueError: if it cannot be read.
    """
    with TorchDistReader(checkpoint) as reader:
        keys = {key for key, _ in StackedTensors(reader).names.values()}
        return sum(math.prod(reader.shape(key)) for key in keys)


def check_fp32_memory(num_parameters: int, *, what: str, instead: str, also_on_host: bool) -> None:
    """Refuse to begin what would be killed for its memory.

    Args:
        num_parameters: of the model, which runs on this process's device.
        what: takes that memory, such as an option.
        instead: what else can be done.
        also_on_host: a second copy runs on the CPU wherever the device is; without a GPU the two are not there at once.

    Raises:
        ValueError: with what is needed and what was found.
    """
    needed, gpu = fp32_bytes(num_parameters), device_memory.free_gpu_memory_bytes()
    found = {}
    if gpu is not None:
        found["on the GPU (CUDA_VISIBLE_DEVICES= hides it, and the CPU serves)"] = gpu
    if gpu is None or also_on_host:
        found["on this host, or of what this job may use of it"] = available_bytes()
    for where, free in found.items():
        if free < needed:
            raise ValueError(
                f"{what} runs a model of {num_parameters / 1e9:.2f} billion parameters in fp32 and needs about "
                f"{needed / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free {where}. Nothing was written: {instead}"
            )
