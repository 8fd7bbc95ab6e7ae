"""Copying Hugging Face weights into a live model that may be cut over tensor- and pipeline-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_cocoa.checkpoint.huggingface import HuggingFaceReader, check_coverage
from megatron_cocoa.checkpoint.mapping import EMBEDDING, OWN_PREFIXES, NameTable
from megatron_cocoa.checkpoint.mean_row import set_mean_row
from megatron_cocoa.checkpoint.tensor_mapping import Mapping
from megatron_cocoa.parallel.fp8_parameters import set_values


@dataclass(frozen=True)
class LoadReport:
    """What happened to this rank's parameters.

    Args:
        loaded: global Megatron names of the parameters that were filled.
        left: names of this project's own parameters, which kept their initial values.
        hf_names: Hugging Face tensors that were read; over all ranks together they must be all of them.
    """

    loaded: tuple[str, ...]
    left: tuple[str, ...]
    hf_names: frozenset[str]


def global_name(module: nn.Module, name: str) -> str:
    """Megatron name with *global* layer numbers of a parameter that ``module.named_parameters()`` calls ``name``.

    Wrappers (DDP, Float16Module) are stripped. A pipeline stage numbers its layers from 0; the global number is the
    layer's own ``layer_number``, which counts from 1.

    Raises:
        ValueError: if a layer carries no ``layer_number``.
    """
    parts = name.split(".")
    wrappers = next((i for i, part in enumerate(parts) if part != "module"), 0)
    if ".".join(parts[wrappers:]).startswith(OWN_PREFIXES):
        return ".".join(parts[wrappers:])
    for i in range(wrappers, len(parts) - 1):
        if parts[i] == "layers" and parts[i + 1].isdigit():
            layer = module.get_submodule(".".join(parts[: i + 2]))
            number = getattr(layer, "layer_number", None)
            if number is None:
                raise ValueError(f"layer {'.'.join(parts[: i + 2])} has no layer_number: cannot tell which one it is")
            parts[i + 1] = str(number - 1)
    return ".".join(parts[wrappers:])


def load_huggingface_weights(
    modules: Sequence[nn.Module],
    source: HuggingFaceReader | str | Path,
    table: NameTable,
    *,
    tp_rank: int,
    tp_size: int,
    mean_row: int | None = None,
    used_rows: int | None = None,
) -> LoadReport:
    """Fill the parameters of this rank's model chunks from a Hugging Face folder, cast to the parameters' dtype.

    The folder is checked as a whole first, so that nothing is half loaded when a key is missing. One unsharded tensor
    is in memory at a time.

    Args:
        modules: model chunks of this rank, one per virtual pipeline stage.
        source: folder or reader.
        table: name table of the model, with the padding that the modules have.
        tp_rank, tp_size: this rank's place in its tensor-parallel group.
        mean_row: embedding row to set to the mean of the rows in use (the mask token's), None to set none.
        used_rows: rows of the embedding that the tokenizer uses; None takes all that Hugging Face's table has.

    Raises:
        ValueError: if the folder does not fit the table (see ``check_coverage``), a parameter is unknown to the
            table, or a local shape is not the one that the layout gives, with the shapes.
    """
    reader = source if isinstance(source, HuggingFaceReader) else HuggingFaceReader(source)
    try:
        check_coverage(reader, table)
        return fill_parameters(
            modules, reader.read, table, tp_rank=tp_rank, tp_size=tp_size, mean_row=mean_row, used_rows=used_rows
        )
    finally:
        if reader is not source:
            reader.close()


@torch.no_grad()
def fill_parameters(
    modules: Sequence[nn.Module],
    read: Callable[[Mapping], Tensor],
    table: NameTable,
    *,
    tp_rank: int,
    tp_size: int,
    mean_row: int | None = None,
    used_rows: int | None = None,
) -> LoadReport:
    """Fill parameters from whole Megatron tensors that ``read`` gives for each mapping; else as above."""
    rows = table.vocab_size if used_rows is None else used_rows
    loaded, left, hf_names = [], [], set()
    for module in modules:
        for local_name, parameter in module.named_parameters():
            name = global_name(module, local_name)
            if table.is_own(name):
                left.append(name)
                continue
            mapping = table.megatron_to_hf(name)
            tensor = read(mapping)
            if mean_row is not None and mapping.megatron_name == EMBEDDING:
                tensor = set_mean_row(tensor, row=mean_row, used_rows=rows)
            copy_shard(parameter, mapping, tensor, tp_rank=tp_rank, tp_size=tp_size)
            loaded.append(name)
            hf_names.update(mapping.hf_names)
    return LoadReport(tuple(loaded), tuple(left), frozenset(hf_names))


@torch.no_grad()
def copy_shard(parameter: nn.Parameter, mapping: Mapping, tensor: Tensor, *, tp_rank: int, tp_size: int) -> None:
    """Copy this rank's part of the whole Megatron ``tensor`` into ``parameter``.

    Raises:
        ValueError: if the part does not have the parameter's shape.
    """
    shard = mapping.shard(tensor, tp_rank=tp_rank, tp_size=tp_size)
    if shard.shape != parameter.shape:
        raise ValueError(
            f"{mapping.megatron_name}: this rank's parameter has shape {tuple(parameter.shape)}, the checkpoint gives "
            f"{tuple(shard.shape)} at tensor parallel degree {tp_size} (unsharded {tuple(tensor.shape)})"
        )
    set_values(parameter, shard)
