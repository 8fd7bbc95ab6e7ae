"""Equality of tensors as they lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have equal dtype, shape and bits (NaN equals itself, +0 differs from -0)."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.flatten().view(torch.uint8), second.flatten().view(torch.uint8))
