"""A tiny random model as a Hugging Face folder, as a Megatron checkpoint, and exported for use."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from megatron_cocoa.conversion.hf_to_mcore import convert_hf_to_mcore
from megatron_cocoa.export.folder import EmbedderOptions, export_embedder
from tests.distributed.tiny_run import write_folders


@dataclass(frozen=True)
class Folders:
    """``hf`` is written by transformers (causal, as published), ``exported`` by this project."""

    root: Path
    hf: Path
    checkpoint: Path
    exported: Path


def write_exported(root: Path) -> Folders:
    """Every parameter is random: fresh biases are zero and norms one, which would hide exchanges."""
    write_folders(root)
    model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(root / "model"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = float(parameter.dim() == 1 and "norm" in name)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + centre)
    folders = Folders(root, root / "hf", root / "checkpoint", root / "exported")
    model.save_pretrained(folders.hf)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(root / "model" / name, folders.hf)
    convert_hf_to_mcore(folders.hf, folders.checkpoint)
    export_embedder(folders.checkpoint, folders.exported, options=EmbedderOptions("sentence-transformers"))
    return folders
