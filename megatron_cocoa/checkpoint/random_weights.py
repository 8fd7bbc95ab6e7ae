"""Random initial weights that do not depend on the layout.

Each tensor is drawn whole from a generator seeded by the run's seed and the tensor's Hugging Face name, then
sharded like a loaded one: TP2 x PP2 starts from the very weights that one process starts from. Distribution as
Hugging Face's ``_init_weights``: matrices from N(0, ``initializer_range``), norm weights one, biases zero.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megatron_cocoa.checkpoint.tensor_mapping import Mapping


def draw(name: str, shape: tuple[int, ...], *, seed: int, spread: float) -> Tensor:
    """float32 N(0, ``spread``) of ``shape``, a function of ``(seed, name)`` alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, spread, generator=generator)


class RandomWeights:
    """Stands where a Hugging Face folder would be read: ``read(mapping)`` gives the whole Megatron tensor.

    ``prefix`` stands before the names that tensors are drawn by, for weights of the same shapes and other values.
    """

    def __init__(self, *, seed: int, initializer_range: float, prefix: str = ""):
        self.seed, self.initializer_range, self.prefix = seed, initializer_range, prefix

    def read(self, mapping: Mapping) -> Tensor:
        return mapping.merge([self._tensor(n, shape) for n, shape in zip(mapping.hf_names, mapping.hf_shapes)])

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        return draw(self.prefix + name, shape, seed=self.seed, spread=self.initializer_range)
