"""From a Megatron checkpoint to a Hugging Face folder: what the command line tool calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.checkpoint.export import ExportReport, export_huggingface
from megatron_cocoa.checkpoint.info import IMPORT_STAGE, INFO_FILE, CheckpointInfo, read_info
from megatron_cocoa.checkpoint.mapping import NameTable
from megatron_cocoa.checkpoint.own_tensors import OWN_FILE, write_own_tensors
from megatron_cocoa.checkpoint.progress import Progress
from megatron_cocoa.checkpoint.stacked import StackedTensors
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.conversion.companions import companion_folder
from megatron_cocoa.conversion.hf_to_mcore import config_of, read_config
from megatron_cocoa.conversion.same_model import check_same_model

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
    with_cocoa_tensors: bool = False,
    dialect: str = "auto",
    progress: Progress | None = None,
) -> ExportReport:
    """Write a checkpoint as a Hugging Face folder: the weights, and the configuration as it is.

    Args:
        source: complete checkpoint of any layout and stage.
        target: folder to create.
        companions: Hugging Face folder whose configuration, tokenizer and processor files go along; None takes
            those that an imported checkpoint carries, or the run's settings name, else the configuration alone.
        dtype: cast to it; None keeps the checkpoint's.
        spelling, max_shard_bytes, overwrite, progress: see ``export_huggingface``.
        with_cocoa_tensors: write image decoder and mask token's row into ``cocoa.safetensors`` too.
        dialect: one of ``mapping.DIALECTS``, if the checkpoint must be in that one; ``auto`` takes either.

    Raises:
        ValueError: for anything that does not fit, before or while writing; nothing is left at the target then.
    """
    source = Path(source)
    with TorchDistReader(source) as reader, companion_folder(source, companions) as folder:
        tensors = StackedTensors(reader)
        if dialect not in ("auto", tensors.dialect):
            raise ValueError(f"{source} has names of the dialect {tensors.dialect}, not {dialect}: leave --dialect out")
        table = table_of(source, tensors, folder)
        info = read_info(source) if with_cocoa_tensors or (source / INFO_FILE).is_file() else None
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
            progress=progress,
            write_own=(lambda work: write_own_tensors(work, tensors, table, info, dtype=dtype))
            if with_cocoa_tensors
            else None,
        )
        left_out = list(report.left_out)
        if info is not None and not with_cocoa_tensors:
            left_out += _mask_token_line(info)
        if tensors.num_optimizer_tensors:
            left_out.append(f"{tensors.num_optimizer_tensors} tensor(s) of the optimizer's state: a model has none")
        if not (folder / "tokenizer.json").is_file():
            left_out.append(NO_TOKENIZER)
    return replace(report, left_out=tuple(left_out))


def _mask_token_line(info: CheckpointInfo) -> list[str]:
    if info.stage == IMPORT_STAGE or info.mask_token_id < 0:
        return []
    return [
        f"that row {info.mask_token_id} of the embedding is the mask token's, and that stage {info.stage} trained it: "
        f"{OWN_FILE} (--with-cocoa-tensors) would say so, and the row itself is in the table"
    ]


def table_of(checkpoint: Path, tensors: StackedTensors, folder: Path | None = None) -> NameTable:
    """The name table of a checkpoint, with its padding and dialect.

    The configuration is that of ``folder``, or the checkpoint's own.

    Raises:
        ValueError: if the configuration is missing, of another architecture, or describes another model than the
            checkpoint says that it holds.
    """
    if folder is not None:
        config = read_config(folder)
    else:
        config = config_of(read_info(checkpoint).hf_config, origin=f"the hf_config of {checkpoint}")
    architecture = QwenVLArchitecture.from_huggingface(config)
    if folder is not None and (checkpoint / INFO_FILE).is_file():
        check_same_model(checkpoint, folder, architecture)
    return NameTable(architecture, vision_ffn_multiple=tensors.vision_ffn_multiple, dialect=tensors.dialect)
