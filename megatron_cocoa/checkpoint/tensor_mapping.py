"""One Megatron tensor and the Hugging Face tensors that it is made of: its names, shapes, layout and sharding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_cocoa.checkpoint.layouts import Layout, VocabularyRows
from megatron_cocoa.checkpoint.sharding import Sharding, shard, unshard

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Mapping:
    """One Megatron tensor and the Hugging Face tensors that it is made of.

    Args:
        megatron_name: with the global layer number (``...decoder.layers.N...``).
        hf_names: flat spelling, in the order that ``merge`` takes.
        hf_shapes: shapes of those tensors.
        layout, sharding: see ``layouts`` and ``sharding``.
    """

    megatron_name: str
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    layout: Layout
    sharding: Sharding

    @property
    def megatron_shape(self) -> tuple[int, ...]:
        """Shape of the unsharded Megatron tensor, padding included."""
        return self.layout.merged_shape(self.hf_shapes)

    @property
    def layer(self) -> int | None:
        """Global layer number, None outside of layers."""
        match = _LAYER.search(self.megatron_name)
        return int(match[1]) if match else None

    @property
    def stacked_name(self) -> str:
        """Key in a distributed checkpoint, which stacks the layers of a decoder in a new dimension 0."""
        return _LAYER.sub(".layers.", self.megatron_name)

    def padded_to(self, width: int) -> Mapping:
        """The same tensor with an ffn that is padded to ``width``, for a mapping whose layout pads."""
        return replace(self, layout=replace(self.layout, padded_width=width))

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """The unsharded Megatron tensor from Hugging Face's tensors.

        Raises:
            ValueError: if there are too few or too many, or a shape is not the one that the configuration gives.
        """
        if len(parts) != len(self.hf_names):
            raise ValueError(f"{self.megatron_name} is made of {len(self.hf_names)} tensors, found {len(parts)}")
        for name, shape, part in zip(self.hf_names, self.hf_shapes, parts):
            if tuple(part.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(part.shape)}, needed {shape}")
        if len({part.dtype for part in parts}) > 1:
            found = ", ".join(f"{name} {part.dtype}" for name, part in zip(self.hf_names, parts))
            raise ValueError(f"the parts of {self.megatron_name} need one dtype, found {found}")
        return self.layout.merge(parts)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Hugging Face's tensors, in the order of ``hf_names``, from the unsharded Megatron tensor.

        Raises:
            ValueError: on a wrong shape, or where padding that would be removed is not zero.
        """
        found, needed = tuple(tensor.shape), self.megatron_shape
        rows_may_vary = isinstance(self.layout, VocabularyRows) and found[:1] >= (self.layout.rows,)
        if found != needed and not (rows_may_vary and found[1:] == needed[1:]):
            raise ValueError(f"{self.megatron_name} has shape {found}, needed {needed}")
        try:
            return self.layout.split(tensor)
        except ValueError as error:
            raise ValueError(f"{self.megatron_name}: {error}") from error

    def shard(self, tensor: Tensor, *, tp_rank: int, tp_size: int) -> Tensor:
        """What rank ``tp_rank`` of ``tp_size`` holds of the unsharded ``tensor``.

        Raises:
            ValueError: if ``tp_size`` does not divide it.
        """
        try:
            return shard(tensor, self.sharding, tp_rank=tp_rank, tp_size=tp_size)
        except ValueError as error:
            raise ValueError(f"{self.megatron_name}: {error}") from error

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The unsharded tensor from the parts of all tensor-parallel ranks, in rank order."""
        try:
            return unshard(shards, self.sharding)
        except ValueError as error:
            raise ValueError(f"{self.megatron_name}: {error}") from error
