"""Writing a Hugging Face model folder as a Megatron distributed checkpoint: streamed, and whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_cocoa.checkpoint.export import COMPANION_FILES
from megatron_cocoa.checkpoint.huggingface import HuggingFaceReader, check_coverage
from megatron_cocoa.checkpoint.info import INFO_FILE, CheckpointInfo
from megatron_cocoa.checkpoint.mapping import LOGIT_SCALE, NameTable
from megatron_cocoa.checkpoint.own_tensors import OWN_FILE, OwnTensors, own_tensors
from megatron_cocoa.checkpoint.placement import check_target, new_folder
from megatron_cocoa.checkpoint.progress import Progress, counted
from megatron_cocoa.checkpoint.stacked import StackedLayout
from megatron_cocoa.checkpoint.tensor_mapping import Mapping
from megatron_cocoa.checkpoint.torch_dist_reader import BACKEND_FILE
from megatron_cocoa.checkpoint.torch_dist_writer import CHUNK_BYTES, TorchDistWriter
from megatron_cocoa.parallel.threads import map_ahead

COMPANION_FOLDER = "huggingface"
"""Inside of an imported checkpoint: configuration, tokenizer and processor files for the way back."""

VOCABULARY_MULTIPLE = 128 * 16
"""Vocabulary rows are stored up to a multiple of this, with zeros: the padding of tensor parallel degrees up to 16, so
that no load leaves padding rows at random values. Megatron takes as many rows as it needs."""

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class ImportReport:
    """What an import wrote.

    Args:
        path: the finished checkpoint.
        num_hf_tensors, num_tensors: Hugging Face tensors, and the Megatron tensors (layers stacked) made of them.
        num_bytes: their size.
        ignored: keys on disk that are not weights of the model, each with the reason.
        own: what was read from ``cocoa.safetensors``, in a line; None where the folder has none.
    """

    path: Path
    num_hf_tensors: int
    num_tensors: int
    num_bytes: int
    ignored: dict[str, str]
    own: str | None = None


def import_huggingface(
    source: str | Path,
    table: NameTable,
    target: str | Path,
    *,
    info: CheckpointInfo,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Write the model in ``source`` as a checkpoint that ``store.load_checkpoint`` loads at any layout.

    Two Megatron tensors of one layer are in memory at a time: the next one is read while one is written.

    Args:
        source: Hugging Face model folder; its ``cocoa.safetensors``, where it has one, is put back in its place.
        table: name table of the model, without padding of the vocabulary.
        target: folder to create.
        info: goes into the checkpoint.
        dtype: cast to it; None keeps what is on disk.
        overwrite: replace an existing checkpoint at ``target``.
        progress: is told how many of the Megatron tensors are written.

    Raises:
        ValueError: if the folder does not fit the table, its tensors have several dtypes (and ``dtype`` is None), the
            target must not be written, or the disk is too small. Nothing is left at the target then, and what was
            there stays.
        OSError: if writing fails, with the same promise.
    """
    source, target = Path(source), Path(target).absolute()
    check_target(target, source, marker=BACKEND_FILE, kind="distributed checkpoint", overwrite=overwrite)
    with HuggingFaceReader(source) as reader, own_tensors(source, table) as own:
        coverage = check_coverage(reader, table)
        found = _common_dtype(reader, table, own, cast=dtype is not None)
        info = info if own is None else own.info(info)
        rows = -(-table.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        layout = StackedLayout(table, vocabulary_rows=rows)
        shapes = {mapping.stacked_name: layout.shape(mapping) for mapping in table}
        room = (dtype or found).itemsize * sum(torch.Size(shape).numel() for shape in shapes.values())

        def read(mapping: Mapping) -> Tensor:
            tensor = reader.read(mapping)
            return tensor if own is None else own.with_rows(mapping, tensor, limit=rows)

        with (
            new_folder(target, num_bytes=room) as work,
            TorchDistWriter(work) as writer,
            contextlib.closing(map_ahead(read, table, num_workers=1, num_ahead=2)) as tensors,
        ):
            for mapping, tensor in zip(counted(table, progress), tensors):
                for values, offset in layout.blocks(mapping, tensor, max_bytes=CHUNK_BYTES):
                    values = values if dtype is None else values.to(dtype)
                    writer.write(mapping.stacked_name, values, shape=shapes[mapping.stacked_name], offset=offset)
                for key in layout.empty_states(mapping):
                    writer.write_empty_state(key)
            if own is not None:
                _write_heads(own, writer, dtype)
            _copy_companions(source, work / COMPANION_FOLDER)
            (work / INFO_FILE).write_text(json.dumps(asdict(info), indent=1), encoding="utf-8")
            writer.finish()
        said = None if own is None else own.line()
    return ImportReport(target, len(coverage.mapped), len(shapes), writer.num_bytes, coverage.ignored, said)


def _write_heads(own: OwnTensors, writer: TorchDistWriter, dtype: torch.dtype | None) -> None:
    for key in own.heads:
        tensor = own.file.read(key)
        tensor = tensor if dtype is None or key == LOGIT_SCALE else tensor.to(dtype)
        writer.write(key, tensor, shape=tensor.shape, offset=(0,) * tensor.dim())
    for key in own.empty_states:
        writer.write_empty_state(key)


def _common_dtype(reader: HuggingFaceReader, table: NameTable, own: OwnTensors | None, *, cast: bool) -> torch.dtype:
    """The dtype of all tensors but the temperature; where they will be cast anyway, the one of the first."""
    names: dict[str, list[str]] = {}
    for name in table.hf_shapes:
        names.setdefault(reader.dtype(name), []).append(name)
    for name in own.file.keys() if own is not None else ():
        if name == LOGIT_SCALE:
            continue
        names.setdefault(own.file.dtype(name), []).append(f"{name} in {OWN_FILE}")
    unknown = {word: group for word, group in names.items() if word not in _DTYPES}
    if unknown or (len(names) > 1 and not cast):
        listed = "; ".join(f"{len(group)} {word} ({', '.join(group[:5])})" for word, group in names.items())
        raise ValueError(
            f"{reader.path} holds weights of dtype {listed}: needed one dtype, {', '.join(_DTYPES)}; a Megatron tensor "
            f"joins the layers of several, choose --dtype bf16 or fp32 to cast them"
        )
    return _DTYPES[next(iter(names))]


def _copy_companions(source: Path, folder: Path) -> None:
    folder.mkdir()
    for name in ("config.json", *COMPANION_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
