"""Whether a Hugging Face folder and a Megatron checkpoint hold the same weights, bit for bit, read back from disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_cocoa.checkpoint.bits import same_bits
from megatron_cocoa.checkpoint.huggingface import HuggingFaceReader, check_coverage
from megatron_cocoa.checkpoint.mapping import NameTable
from megatron_cocoa.checkpoint.progress import Progress, counted
from megatron_cocoa.checkpoint.stacked import StackedTensors
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader


@dataclass(frozen=True)
class BitComparison:
    """Which tensors agree.

    Args:
        num_tensors: Hugging Face tensors that were compared.
        different: one line for each that differs.
    """

    num_tensors: int
    different: tuple[str, ...]


def compare_weights(
    huggingface: str | Path,
    megatron: str | Path,
    table: NameTable,
    *,
    source: Literal["huggingface", "megatron"],
    progress: Progress | None = None,
) -> BitComparison:
    """Compare all tensors of the two, one at a time.

    Args:
        huggingface: model folder.
        megatron: distributed checkpoint.
        table: name table with the checkpoint's padding.
        source: the side that the other was made from; where dtypes differ, it is cast to the other's.
        progress: is told how many of the Megatron tensors are compared.

    Raises:
        ValueError: if either side cannot be read or lacks a tensor.
    """
    different = []
    with HuggingFaceReader(huggingface) as reader, TorchDistReader(megatron) as checkpoint:
        check_coverage(reader, table)
        tensors = StackedTensors(checkpoint)
        for mapping in counted(table, progress):
            if mapping.megatron_name not in tensors.names:
                raise ValueError(f"{megatron} holds no tensor {mapping.megatron_name}")
            for name, ours in zip(mapping.hf_names, mapping.split(tensors(mapping.megatron_name))):
                theirs = reader.get(name)
                pair = (theirs.to(ours.dtype), ours) if source == "huggingface" else (theirs, ours.to(theirs.dtype))
                if not same_bits(*pair):
                    different.append(f"{name}: {_difference(*pair)}")
    return BitComparison(len(table.hf_shapes), tuple(different))


def _difference(theirs: torch.Tensor, ours: torch.Tensor) -> str:
    differ = theirs.float() != ours.float()
    largest = float((theirs.float() - ours.float()).abs().max())
    return f"{int(differ.sum())} of {differ.numel()} values differ, by up to {largest:.3g}"
