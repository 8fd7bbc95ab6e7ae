"""Writing Hugging Face model folders: streamed, in shards, and whole or not at all."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_cocoa.checkpoint.huggingface import INDEX_FILE, SINGLE_FILE
from megatron_cocoa.checkpoint.layouts import VocabularyRows
from megatron_cocoa.checkpoint.mapping import NameTable, nested_spelling
from megatron_cocoa.checkpoint.placement import check_target, new_folder
from megatron_cocoa.checkpoint.progress import Progress, counted
from megatron_cocoa.checkpoint.safetensors_stream import write_safetensors
from megatron_cocoa.checkpoint.tensor_mapping import Mapping
from megatron_cocoa.parallel.threads import map_ahead

COMPANION_FILES = (
    "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip
"""Copied from the source folder where they exist. Nothing else is, above all no code and no other weights."""

_WIDEST_ITEM = 4


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Args:
        path: the finished folder.
        files: weight files.
        num_tensors, num_bytes: Hugging Face tensors, and their size.
        left_out: one line for each thing that the Megatron checkpoint holds and the folder does not.
        beside: one line for each further file that the caller asked for.
    """

    path: Path
    files: tuple[str, ...]
    num_tensors: int
    num_bytes: int
    left_out: tuple[str, ...]
    beside: tuple[str, ...] = ()


def export_huggingface(
    tensors: Callable[[str], Tensor],
    table: NameTable,
    target: str | Path,
    *,
    source: str | Path,
    names: Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
    spelling: Literal["flat", "nested"] = "flat",
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    keep: str | Path | None = None,
    write_own: Callable[[Path], str] | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the model as a Hugging Face folder. Two Megatron tensors are in memory at a time: the next one is read
    while one is written.

    Args:
        tensors: gives the unsharded tensor of a Megatron name with global layer numbers; called in a thread.
        table: name table of the model.
        target: folder to create.
        source: folder whose configuration, tokenizer and processor files are copied.
        names: all per-layer names that the Megatron checkpoint holds, to find what has no place in the folder or is
            missing; None skips that check.
        dtype: cast to it; None keeps each tensor's.
        spelling: names on disk, ``flat`` as published, or ``nested``.
        max_shard_bytes: upper bound on a weight file, except where a single Megatron tensor exceeds it.
        overwrite: replace an existing model folder at ``target``.
        keep: folder that the tensors come from, if it is not ``source``: it is never overwritten either.
        write_own: writes what has no place in a Hugging Face model into a file of its own, in the folder that it is
            given, and returns a line about it; None leaves it out.
        progress: is told how many of the Megatron tensors are written.

    Raises:
        ValueError: if the target exists and ``overwrite`` is off or it is not a model folder, the source has no
            ``config.json``, ``names`` and the table disagree, a shape is wrong, or padding is not zero. Nothing is left
            at the target then, and what was there stays.
    """
    source, target = Path(source), Path(target).absolute()
    if keep is not None:
        check_target(target, Path(keep), marker="config.json", kind="model folder", overwrite=overwrite)
    _check_places(source, target, overwrite)
    left_out = [] if names is None else _check_names(names, table)
    item_bytes = dtype.itemsize if dtype else _WIDEST_ITEM
    shards = _plan_shards(table, max_shard_bytes, item_bytes)
    spell = nested_spelling if spelling == "nested" else str
    splitter = _Splitter(tensors, dtype, spell, left_out)
    weight_map: dict[str, str] = {}
    files, num_bytes, beside = [], 0, ()
    room = dtype.itemsize * sum(torch.Size(shape).numel() for shape in table.hf_shapes.values()) if dtype else 0
    planned = list(itertools.chain.from_iterable(shards))
    with (
        new_folder(target, num_bytes=room) as work,
        contextlib.closing(map_ahead(splitter.parts, planned, num_workers=1, num_ahead=2)) as made,
    ):
        steps = (parts for _, parts in zip(counted(planned, progress), made))
        for number, mappings in enumerate(shards, start=1):
            file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            shapes = {spell(n): s for m in mappings for n, s in zip(m.hf_names, m.hf_shapes)}
            parts = itertools.chain.from_iterable(itertools.islice(steps, len(mappings)))
            num_bytes += write_safetensors(work / file, parts, shapes)
            files.append(file)
            weight_map.update(dict.fromkeys(shapes, file))
        # The last one counts as done when the next one is asked for.
        next(steps, None)
        if len(shards) > 1:
            _write_json(work / INDEX_FILE, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
        _copy_companions(source, work, splitter.dtypes)
        if write_own is not None:
            left_out, beside = [], (write_own(work),)
    return ExportReport(target, tuple(files), len(weight_map), num_bytes, tuple(left_out), beside)


class _Splitter:
    """Reads and splits Megatron tensors, and notes what it saw."""

    def __init__(
        self,
        tensors: Callable[[str], Tensor],
        dtype: torch.dtype | None,
        spell: Callable[[str], str],
        left_out: list[str],
    ) -> None:
        self.tensors, self.dtype, self.spell, self.left_out = tensors, dtype, spell, left_out
        self.dtypes: set[torch.dtype] = set()

    def parts(self, mapping: Mapping) -> list[tuple[str, Tensor]]:
        """What a file takes of one tensor, as it stands there."""
        tensor = self.tensors(mapping.megatron_name)
        if isinstance(mapping.layout, VocabularyRows):
            dropped = int(tensor[mapping.layout.rows :].any(dim=1).sum())
            if dropped:
                self.left_out.append(
                    f"{dropped} non-zero row(s) of {mapping.megatron_name} beyond the vocabulary's "
                    f"{mapping.layout.rows} have no place in a Hugging Face table"
                )
        parts = [part.to(self.dtype or part.dtype).contiguous() for part in mapping.split(tensor)]
        self.dtypes.update(part.dtype for part in parts)
        return list(zip(map(self.spell, mapping.hf_names), parts))


def _check_places(source: Path, target: Path, overwrite: bool) -> None:
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} has no config.json: needed the Hugging Face folder that the model came from")
    check_target(target, source, marker="config.json", kind="model folder", overwrite=overwrite)


def _check_names(names: Iterable[str], table: NameTable) -> list[str]:
    resolved = {table.resolve(name) for name in names}
    own = sorted(name for name in resolved if table.is_own(name))
    known = {mapping.megatron_name for mapping in table}
    unknown, missing = sorted(resolved - known - set(own)), sorted(known - resolved)
    if unknown or missing:
        raise ValueError(
            f"the Megatron checkpoint does not fit the configuration. {len(unknown)} tensor(s) that no mapping knows: "
            f"{unknown[:20]}; {len(missing)} missing: {missing[:20]}"
        )
    if not own:
        return []
    heads = sorted({name.split(".")[0] for name in own})
    return [
        f"{len(own)} tensor(s) of {', '.join(heads)} have no Hugging Face counterpart: only the Megatron checkpoint "
        f"holds them"
    ]


def _plan_shards(table: NameTable, max_shard_bytes: int, item_bytes: int) -> list[list[Mapping]]:
    shards: list[list[Mapping]] = [[]]
    filled = 0
    for mapping in table:
        size = item_bytes * sum(torch.Size(shape).numel() for shape in mapping.hf_shapes)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(mapping)
        filled += size
    return shards


def _copy_companions(source: Path, work: Path, dtypes: set[torch.dtype]) -> None:
    for name in COMPANION_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, work / name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if len(dtypes) == 1:
        dtype = str(next(iter(dtypes))).removeprefix("torch.")
        if "torch_dtype" not in config:
            config["dtype"] = dtype
        for part in (config, config.get("text_config"), config.get("vision_config")):
            for key in ("dtype", "torch_dtype"):
                if isinstance(part, dict) and key in part:
                    part[key] = dtype
    _write_json(work / "config.json", config)


def _write_json(path: Path, value: object) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
