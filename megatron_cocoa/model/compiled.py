"""Chains of element-wise operations as one kernel on a GPU.

Uncompiled, each operation of a chain reads and writes the GPU's memory; compiled, the chain does so once. On a CPU such
functions run as they are: the layers save passes there by blocks and in-place operations. torch's switch
``TORCH_COMPILE_DISABLE=1`` turns compiling off on a machine without a compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_cocoa.parallel.device import is_on_gpu


def compiled_on_gpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` of tensors, compiled once for all sizes at its first call with a first argument on a GPU."""
    # Compiling is set up at the first call: it takes longer to import than the rest of torch.
    compiled = functools.cache(lambda: torch.compile(function, dynamic=True))

    @functools.wraps(function)
    def call(first: Tensor, *others: Tensor) -> Tensor:
        return (compiled() if is_on_gpu(first) else function)(first, *others)

    return call
