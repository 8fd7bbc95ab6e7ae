"""Names of adapters: what Megatron keeps beside a fused projection, and the tensors of peft that it is made of.

Derived from the name table of the weights, so that adapters cannot be cut, grouped or padded otherwise than the
weight that they change. peft keeps one A, one B and one magnitude for each Hugging Face module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cocoa.checkpoint.layouts import Layout, Same
from megatron_cocoa.checkpoint.mapping import NameTable
from megatron_cocoa.checkpoint.sharding import Sharding
from megatron_cocoa.checkpoint.tensor_mapping import Mapping
from megatron_cocoa.config import AdapterSettings

_PROJECTION = re.compile(r"(.*\.linear_(?:qkv|proj|fc1|fc2))\.weight")
LORA_A, LORA_B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"


@dataclass(frozen=True)
class Stacked:
    """The A of all targeted modules, one below the other; their columns are laid out as the weight's."""

    columns: Layout
    num_parts: int

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        return self.columns.merge([torch.cat(list(parts))])

    def split(self, tensor: Tensor) -> list[Tensor]:
        return list(self.columns.split(tensor)[0].chunk(self.num_parts))

    def merged_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return self.columns.merged_shape([(sum(shape[0] for shape in shapes), *shapes[0][1:])])


@dataclass(frozen=True)
class Targeted:
    """Rows laid out as the weight's, of which the modules that no adapter targets are zero.

    Args:
        rows: layout of the weight's rows.
        heights: rows of each module of the projection.
        targeted: which of the modules have an adapter.
    """

    rows: Layout
    heights: tuple[int, ...]
    targeted: tuple[bool, ...]

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        given = iter(parts)
        return self.rows.merge(
            [
                next(given) if is_targeted else parts[0].new_zeros(height, *parts[0].shape[1:])
                for height, is_targeted in zip(self.heights, self.targeted)
            ]
        )

    def split(self, tensor: Tensor) -> list[Tensor]:
        parts = self.rows.split(tensor)
        stray = sum(int(part.count_nonzero()) for part, kept in zip(parts, self.targeted) if not kept)
        if stray:
            raise ValueError(f"{stray} non-zero value(s) in rows that no adapter targets, needed all zero")
        return [part for part, kept in zip(parts, self.targeted) if kept]

    def merged_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return self.rows.merged_shape([(height, *shapes[0][1:]) for height in self.heights])


def adapter_mappings(table: NameTable, settings: AdapterSettings) -> tuple[Mapping, ...]:
    """All adapter tensors of a model, in the order of the name table; Hugging Face names in the flat spelling.

    Args:
        table: of the model, in the sharded dialect.
        settings: kind, rank and targets.
    """
    return tuple(adapter for mapping in table for adapter in _of_projection(mapping, settings))


def peft_name(hf_name: str) -> str:
    """peft's name in ``adapter_model.safetensors`` of a name in Hugging Face's nested spelling."""
    return f"base_model.model.{hf_name}"


def _of_projection(mapping: Mapping, settings: AdapterSettings) -> Iterator[Mapping]:
    match = _PROJECTION.fullmatch(mapping.megatron_name)
    if match is None:
        return
    wanted = settings.vision_targets if mapping.megatron_name.startswith("vision_model.") else settings.language_targets
    modules = [name.removesuffix(".weight") for name in mapping.hf_names]
    targeted = tuple(_target(module) in wanted for module in modules)
    if not any(targeted):
        return
    chosen = [(module, shape) for module, shape, kept in zip(modules, mapping.hf_shapes, targeted) if kept]
    is_row = mapping.sharding is Sharding.ROW
    # A row-parallel weight pads its columns, a column-parallel one its rows.
    rows, columns = (Same(), mapping.layout) if is_row else (mapping.layout, Same())
    by_row = Targeted(rows, tuple(shape[0] for shape in mapping.hf_shapes), targeted)
    row_sharding = Sharding.REPLICATED if is_row else mapping.sharding

    def adapter(name: str, suffix: str, shapes, layout: Layout, sharding: Sharding) -> Mapping:
        names = tuple(f"{module}.{name}{suffix}" for module, _ in chosen)
        return Mapping(f"{match[1]}_adapter.{name}", names, tuple(shapes), layout, sharding)

    inputs = [(settings.rank, shape[1]) for _, shape in chosen]
    column_sharding = Sharding.ROW if is_row else Sharding.REPLICATED
    yield adapter(LORA_A, ".weight", inputs, Stacked(columns, len(chosen)), column_sharding)
    yield adapter(LORA_B, ".weight", [(shape[0], settings.rank) for _, shape in chosen], by_row, row_sharding)
    if settings.kind == "dora":
        yield adapter(MAGNITUDE, "", [shape[:1] for _, shape in chosen], by_row, row_sharding)


def _target(module: str) -> str:
    """What ``language_targets`` and ``vision_targets`` call a module: its last name, the merger's with its number."""
    *_, parent, name = module.split(".")
    return f"{parent}.{name}" if name.isdigit() else name
