"""From a Megatron checkpoint to a Hugging Face folder: what the command line tool calls."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from megatron_cocoa.checkpoint.export import ExportReport, export_huggingface
from megatron_cocoa.checkpoint.import_hf import COMPANION_FOLDER
from megatron_cocoa.checkpoint.mapping import NameTable
from megatron_cocoa.checkpoint.stacked import StackedTensors
from megatron_cocoa.checkpoint.store import read_info
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.conversion.hf_to_mcore import config_of, read_config

NO_TOKENIZER = (
    "no tokenizer or processor files: neither the checkpoint carries them nor was a folder named that has them"
)


def convert_mcore_to_hf(
    source: str | Path,
    target: str | Path,
    *,
    companions: str | Path | None = None,
    dtype: torch.dtype | None = None,
    spelling: Literal["flat", "nested"] = "flat",
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> ExportReport:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        source: complete checkpoint of any layout and stage.
        target: folder to create.
        companions: Hugging Face folder whose configuration, tokenizer and processor files go along; None takes
            those that an imported checkpoint carries, else the configuration alone.
        dtype: cast to it; None keeps the checkpoint's.
        spelling, max_shard_bytes, overwrite: see ``export_huggingface``.

    Raises:
        ValueError: for anything that does not fit, before or while writing; nothing is left at the target then.
    """
    source = Path(source)
    with TorchDistReader(source) as reader, _companion_folder(source, companions) as folder:
        tensors = StackedTensors(reader)
        table = table_of(source, tensors, folder)
        stored = tensors.dtypes
        report = export_huggingface(
            tensors,
            table,
            target,
            source=folder,
            names=tensors.names,
            # Naming a common dtype changes no value, and lets the export plan shards by their real size.
            dtype=dtype or (next(iter(stored)) if len(stored) == 1 else None),
            spelling=spelling,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            keep=source,
        )
        left_out = list(report.left_out)
        if tensors.num_optimizer_tensors:
            left_out.append(f"{tensors.num_optimizer_tensors} tensor(s) of the optimizer's state: a model has none")
        if not (folder / "tokenizer.json").is_file():
            left_out.append(NO_TOKENIZER)
    return replace(report, left_out=tuple(left_out))


def table_of(checkpoint: Path, tensors: StackedTensors, folder: Path | None = None) -> NameTable:
    """The name table of a checkpoint, with its padding and dialect.

    The configuration is that of ``folder``, or the checkpoint's own.

    Raises:
        ValueError: if the configuration is missing or of another architecture.
    """
    if folder is not None:
        config = read_config(folder)
    else:
        config = config_of(read_info(checkpoint).hf_config, origin=f"the hf_config of {checkpoint}")
    return NameTable.from_config(config, vision_ffn_multiple=tensors.vision_ffn_multiple, dialect=tensors.dialect)


@contextmanager
def _companion_folder(checkpoint: Path, named: str | Path | None) -> Iterator[Path]:
    carried = checkpoint / COMPANION_FOLDER
    if named is not None:
        yield Path(named)
    elif (carried / "config.json").is_file():
        yield carried
    else:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(read_info(checkpoint).hf_config), encoding="utf-8")
            yield Path(folder)
