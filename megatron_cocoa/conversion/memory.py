"""Whether the models that a comparison or golden vectors run fit into memory, asked before anything is written."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_cocoa.checkpoint.huggingface import HuggingFaceReader
from megatron_cocoa.checkpoint.stacked import StackedTensors
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.conversion.fp32_layers import held_dtype
from megatron_cocoa.parallel import device_memory
from megatron_cocoa.parallel.host_memory import available_bytes

LARGEST_EXTRA = 3 * 2**30
"""What a process was measured to take beside the FP32 weights of a large model, at least; see docs/results.md."""

VERIFY_EXTRA = 2**30
"""What a comparison takes beside weights: 0.55 GiB were measured, most of it libraries."""

_FP32 = 4
_LAYER = re.compile(r"(.*\.(?:layers|blocks)\.\d+)\.")


@dataclass(frozen=True)
class ModelSize:
    """How many values the weights in a folder have.

    Args:
        in_layers: of both stacks together.
        outside: embeddings, output layer, merger.
        largest_layer: of one layer.
        itemsize: bytes of a value on disk, or as a comparison holds its layer: the largest, where they differ.
    """

    in_layers: int
    outside: int
    largest_layer: int
    itemsize: int

    @classmethod
    def of(cls, num_values: dict[str, int], dtypes: set[torch.dtype]) -> ModelSize:
        """Of the values of each tensor, with a layer's number in its name, and the dtypes of all."""
        layers: Counter[str] = Counter()
        for name, values in num_values.items():
            layers[match[1] if (match := _LAYER.match(name)) else ""] += values
        outside = layers.pop("", 0)
        itemsize = max(dtype.itemsize for dtype in dtypes | {held_dtype(dtypes)})
        return cls(sum(layers.values()), outside, max(layers.values(), default=0), itemsize)

    @property
    def num_parameters(self) -> int:
        return self.in_layers + self.outside

    def verify_bytes(self) -> int:
        """Host memory of ``conversion.forward``'s run: the weights as on disk, what it casts, and its work."""
        weights = self.itemsize * self.num_parameters + _FP32 * (self.outside + self.largest_layer)
        return weights + min(weights // 4, VERIFY_EXTRA)


def fp32_bytes(num_parameters: int) -> int:
    """Memory of a process that runs a model of so many parameters in FP32: the weights, and a share for its work."""
    weights = _FP32 * num_parameters
    return weights + min(weights // 4, LARGEST_EXTRA)


def size_of_huggingface(folder: str | Path) -> ModelSize:
    """Of a model folder, by its headers.

    Raises:
        ValueError: if it cannot be read.
    """
    with HuggingFaceReader(folder) as reader:
        return ModelSize.of({name: math.prod(reader.shape(name)) for name in reader.keys()}, reader.dtypes)


def size_of_checkpoint(checkpoint: str | Path) -> ModelSize:
    """Of the weights in a Megatron checkpoint, by its metadata.

    Raises:
        ValueError: if it cannot be read.
    """
    with TorchDistReader(checkpoint) as reader:
        tensors = StackedTensors(reader)
        num_values = {
            name: math.prod(reader.shape(key)[0 if layer is None else 1 :])
            for name, (key, layer) in tensors.names.items()
        }
        return ModelSize.of(num_values, tensors.dtypes)


def check_fp32_memory(num_parameters: int, *, what: str, instead: str, host_bytes: int | None = None) -> None:
    """Refuse to begin what would be killed for its memory: running a model in FP32.

    Args:
        num_parameters: of the model, which runs on this process's device, where it is FP32 as a whole.
        what: takes that memory, such as an option.
        instead: what else can be done.
        host_bytes: needed on this host instead, where there is no GPU, and besides, where there is one.

    Raises:
        ValueError: with what is needed and what was found.
    """
    gpu = device_memory.free_gpu_memory_bytes()
    asked = {}
    if gpu is not None:
        asked["on the GPU (CUDA_VISIBLE_DEVICES= hides it, and the CPU serves)"] = fp32_bytes(num_parameters), gpu
    if gpu is None or host_bytes is not None:
        needed = fp32_bytes(num_parameters) if host_bytes is None else host_bytes
        asked["on this host, or of what this job may use of it"] = needed, available_bytes()
    for where, (needed, free) in asked.items():
        if free < needed:
            raise ValueError(
                f"{what} runs a model of {num_parameters / 1e9:.2f} billion parameters in fp32 and needs about "
                f"{needed / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free {where}. Nothing was written: {instead}"
            )
