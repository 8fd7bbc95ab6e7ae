"""How tensors change between Hugging Face's layout and Megatron's: pure functions on whole tensors, no names, no files.

A *layout* says how the tensors that Hugging Face keeps apart become one Megatron tensor and come apart again. Every
layout only moves values (and adds zeros that it later checks and removes), so a round trip is bit-exact in any dtype.

Weights and biases share each layout: all regrouping happens in dimension 0, and a bias has only that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Layout(Protocol):
    """A bijection between Hugging Face's tensors (``parts``) and one unsharded Megatron tensor."""

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """Megatron's tensor from Hugging Face's, in the order in which the name table lists them."""

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The inverse of ``merge``."""

    def merged_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Shape of ``merge`` applied to tensors of ``shapes``."""


@dataclass(frozen=True)
class Same:
    """The tensor is the same on both sides."""

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def merged_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return shapes[0]


@dataclass(frozen=True)
class FlatKernel:
    """A convolution whose stride equals its kernel is a matrix product over flattened patches.

    Args:
        kernel: ``(hidden, channels, temporal, patch, patch)``, the shape of Hugging Face's Conv3d weight. Megatron's
            side is ``(hidden, channels * temporal * patch * patch)``, columns in the order of ``pixel_values``.
    """

    kernel: tuple[int, ...]

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].reshape(self.kernel[0], -1)

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.reshape(self.kernel)]

    def merged_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return (self.kernel[0], torch.Size(self.kernel[1:]).numel())


@dataclass(frozen=True)
class GroupedQkv:
    """Separate q, k, v to Megatron's fused projection: per KV group its query heads, then its key, then its value.

    Query head ``h`` belongs to group ``h // queries_per_group`` on both sides, so groups keep their order.

    Args:
        num_query_groups: KV heads.
        queries_per_group: query heads that share one KV head.
        head_dim: rows of one head.
    """

    num_query_groups: int
    queries_per_group: int
    head_dim: int

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        grouped = [part.reshape(self.num_query_groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, tensor: Tensor) -> list[Tensor]:
        grouped = tensor.reshape(self.num_query_groups, -1, *tensor.shape[1:])
        rows = [self.queries_per_group * self.head_dim, self.head_dim, self.head_dim]
        return [part.flatten(0, 1) for part in grouped.split(rows, dim=1)]

    def merged_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


@dataclass(frozen=True)
class InterleavedQkv:
    """The tower's fused projection: Hugging Face's rows run ``[3, heads, dim]``, Megatron's ``[heads, 3, dim]``.

    Args:
        num_heads: attention heads of the tower; each is its own group.
    """

    num_heads: int

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        return self._regroup(parts[0], 3, self.num_heads)

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [self._regroup(tensor, self.num_heads, 3)]

    def merged_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return shapes[0]

    @staticmethod
    def _regroup(tensor: Tensor, outer: int, inner: int) -> Tensor:
        return tensor.reshape(outer, inner, -1, *tensor.shape[1:]).transpose(0, 1).flatten(0, 2)


@dataclass(frozen=True)
class Gated:
    """``[gate; up]`` in dimension 0, each half zero-padded from ``width`` to ``padded_width`` rows.

    A padded gate row gives ``silu(0) * up = 0``, and the matching column of the next projection is zero as well.
    """

    width: int
    padded_width: int

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([pad_with_zeros(part, 0, self.padded_width) for part in parts])

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [remove_zero_padding(half, 0, self.width) for half in tensor.chunk(2)]

    def merged_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return (2 * self.padded_width, *shapes[0][1:])


@dataclass(frozen=True)
class Padded:
    """Zero-padding of dimension ``dim`` from ``width`` to ``padded_width``."""

    dim: int
    width: int
    padded_width: int

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        return pad_with_zeros(parts[0], self.dim, self.padded_width)

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [remove_zero_padding(tensor, self.dim, self.width)]

    def merged_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return (*shapes[0][: self.dim], self.padded_width, *shapes[0][self.dim + 1 :])


@dataclass(frozen=True)
class VocabularyRows:
    """Token rows, zero-padded at import to ``padded_rows``.

    Rows beyond ``rows`` are dropped without a check, and any number of them is accepted: the padding depends on the
    tensor parallel degree that wrote a checkpoint, and training may move it (it may hold the mask token's row, and
    a softmax over padded logits has a gradient).
    """

    rows: int
    padded_rows: int

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        return pad_with_zeros(parts[0], 0, self.padded_rows)

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [tensor[: self.rows]]

    def merged_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return (self.padded_rows, *shapes[0][1:])


def pad_with_zeros(tensor: Tensor, dim: int, width: int) -> Tensor:
    """``tensor`` with zeros appended along ``dim`` up to ``width`` entries; the tensor itself if it has them."""
    missing = width - tensor.shape[dim]
    if missing < 0:
        raise ValueError(f"cannot pad {tensor.shape[dim]} entries of dimension {dim} to fewer: {width}")
    if missing == 0:
        return tensor
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1 - dim) + (0, missing))


def remove_zero_padding(tensor: Tensor, dim: int, width: int) -> Tensor:
    """The first ``width`` entries of ``tensor`` along ``dim``.

    Raises:
        ValueError: if a removed entry is not zero, since dropping it would change what the model computes.
    """
    padding = tensor.narrow(dim, width, tensor.shape[dim] - width)
    if padding.numel() and bool(padding.any()):
        raise ValueError(
            f"padding beyond entry {width} of dimension {dim} has {int(padding.count_nonzero())} non-zero value(s), "
            f"needed all zero: removing it would change the model"
        )
    return tensor.narrow(dim, 0, width)
