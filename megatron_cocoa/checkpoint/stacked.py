"""Where a Megatron tensor of the name table lies in a distributed checkpoint, which stacks layers in dimension 0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cocoa.checkpoint.layouts import VocabularyRows
from megatron_cocoa.checkpoint.mapping import LOGIT_SCALE, NameTable
from megatron_cocoa.checkpoint.sharding import Sharding
from megatron_cocoa.checkpoint.tensor_mapping import Mapping
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader

_LAYERS = ".layers."
_OPTIMIZER = "optimizer."
_STATEFUL = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
_VISION_FC2 = "vision_model.decoder.layers.mlp.linear_fc2.weight"
_OUTPUT_STATE = "language_model.output_layer._extra_state/shard_0_1"


class Block(NamedTuple):
    """A piece of a tensor of a checkpoint: its values and the place of its first one."""

    values: Tensor
    offset: tuple[int, ...]


class StackedLayout:
    """Keys, shapes and offsets of all tensors of a name table.

    Args:
        table: of the model.
        vocabulary_rows: rows that embedding and output layer get in the checkpoint; those beyond the table are zero.
    """

    def __init__(self, table: NameTable, *, vocabulary_rows: int) -> None:
        self.vocabulary_rows = vocabulary_rows
        self._num_layers = Counter(mapping.stacked_name for mapping in table)

    def shape(self, mapping: Mapping) -> tuple[int, ...]:
        """Shape of the whole tensor under ``mapping.stacked_name``."""
        shape = mapping.megatron_shape
        if isinstance(mapping.layout, VocabularyRows):
            return (self.vocabulary_rows, *shape[1:])
        return shape if mapping.layer is None else (self._num_layers[mapping.stacked_name], *shape)

    def blocks(self, mapping: Mapping, tensor: Tensor, *, max_bytes: int) -> Iterator[Block]:
        """Cut the unsharded Megatron tensor into blocks of at most ``max_bytes``, where single rows allow.

        Gate and up come apart, as Megatron stores them.
        """
        rows = max(1, max_bytes // max(1, tensor[:1].numel() * tensor.itemsize))
        halves = 2 if mapping.sharding is Sharding.GATED_COLUMN else 1
        length = tensor.shape[0] // halves
        for start in range(0, tensor.shape[0], length):
            for row in range(start, start + length, rows):
                yield self._block(mapping, tensor[row : min(row + rows, start + length)], row)
        if isinstance(mapping.layout, VocabularyRows) and self.vocabulary_rows > tensor.shape[0]:
            padding = tensor.new_zeros(self.vocabulary_rows - tensor.shape[0], *tensor.shape[1:])
            yield self._block(mapping, padding, tensor.shape[0])

    def empty_states(self, mapping: Mapping) -> list[str]:
        """Keys under which Megatron notes that the layers around ``mapping`` have no state beyond parameters."""
        if mapping.megatron_name.endswith(_STATEFUL):
            place = f"{mapping.layer or 0}_{self._num_layers[mapping.stacked_name]}"
            return [f"{mapping.stacked_name.removesuffix('weight')}_extra_state/shard_{place}"]
        return [_OUTPUT_STATE] if isinstance(mapping.layout, VocabularyRows) else []

    @staticmethod
    def _block(mapping: Mapping, values: Tensor, row: int) -> Block:
        offset = (row, *(0,) * (values.dim() - 1))
        if mapping.layer is None:
            return Block(values, offset)
        return Block(values.unsqueeze(0), (mapping.layer, *offset))


class StackedTensors:
    """The tensors of a checkpoint by per-layer Megatron names: calling it gives one, unsharded.

    Layers that are not stacked, as Megatron writes them for models whose layers differ, have those names already.
    """

    def __init__(self, reader: TorchDistReader) -> None:
        self.reader = reader
        self.num_optimizer_tensors = 0
        self.names: dict[str, tuple[str, int | None]] = {}
        for key in reader.keys():
            if key.startswith(_OPTIMIZER):
                self.num_optimizer_tensors += 1
            elif _LAYERS in key and not key.partition(_LAYERS)[2][0].isdigit():
                before, _, after = key.partition(_LAYERS)
                for layer in range(reader.shape(key)[0]):
                    self.names[f"{before}{_LAYERS}{layer}.{after}"] = (key, layer)
            else:
                self.names[key] = (key, None)

    def __call__(self, name: str) -> Tensor:
        key, layer = self.names[name]
        return self.reader.read(key, layer=layer)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of the weights; the learned temperature is float32 beside any."""
        return {self.reader.dtype(key) for key, _ in self.names.values() if key != LOGIT_SCALE}

    @property
    def dialect(self) -> str:
        """Whose names these are; one of ``mapping.DIALECTS``."""
        return "megatron-bridge" if any(name.startswith("visual.") for name in self.names) else "sharded"

    @property
    def vision_ffn_multiple(self) -> int:
        """What the tower's ffn width must be padded to, to have this checkpoint's shapes."""
        return self.reader.shape(_VISION_FC2)[-1] if _VISION_FC2 in self.reader.keys() else 1
