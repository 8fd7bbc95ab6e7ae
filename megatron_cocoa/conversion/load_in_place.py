"""Loading a checkpoint through Megatron's ``dist_checkpointing`` without a second copy of any weight.

Megatron stores gate and up of a gated projection apart, and its loader joins them into a new tensor for each layer
before any reaches its parameter: at the 3B's width half of the model again. Here the halves are loaded as the views of
the parameter that they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor, nn

from megatron_cocoa.checkpoint.store import sharded_state


@torch.no_grad()
def load_in_place(path: Path, chunks: Sequence[nn.Module]) -> None:
    """Fill all parameters of ``chunks`` from the weights in a checkpoint; every rank calls it.

    Raises:
        ValueError: if the checkpoint lacks a parameter.
    """
    wanted: dict[str, list[ShardedTensor]] = {}
    for part, entries in sharded_state(chunks, is_loading=True).items():
        for name, value in entries.items():
            tensors = list(_tensors(value.build() if isinstance(value, ShardedTensorFactory) else value))
            if tensors:
                wanted[f"{part}.{name}"] = tensors
    present = set(dist_checkpointing.load_tensors_metadata(str(path)))
    absent = sorted({tensor.key for tensors in wanted.values() for tensor in tensors} - present)
    if absent:
        raise ValueError(f"{path} lacks {len(absent)} tensors of the model: {', '.join(absent[:20])}")
    targets = {name: [tensor.data.detach() for tensor in tensors] for name, tensors in wanted.items()}
    _check_complete(targets, chunks)
    # The result holds entries of the checkpoint's own besides, which belong to no model.
    loaded = dist_checkpointing.load(wanted, str(path))
    for name, tensors in targets.items():
        for target, value in zip(tensors, loaded[name], strict=True):
            if value.data_ptr() != target.data_ptr():
                target.copy_(value)


def _tensors(value: Any) -> Iterator[ShardedTensor]:
    """What there is to load in an entry of a sharded state; Megatron's empty states are none."""
    if isinstance(value, ShardedTensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for member in value.values() if isinstance(value, dict) else value:
            yield from _tensors(member)


def _check_complete(targets: dict[str, list[Tensor]], chunks: Sequence[nn.Module]) -> None:
    """Every value of every parameter lies in a target: what is loaded are views, and no parameter is forgotten."""
    filled: dict[int, int] = {}
    for tensors in targets.values():
        for tensor in tensors:
            storage = tensor.untyped_storage().data_ptr()
            filled[storage] = filled.get(storage, 0) + tensor.numel()
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            assert filled.get(parameter.untyped_storage().data_ptr()) == parameter.numel(), f"{name} is not loaded"
