"""A tiny random model as a Hugging Face folder, as a Megatron checkpoint, and exported for use."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from megatron_cocoa.conversion.hf_to_mcore import convert_hf_to_mcore
from megatron_cocoa.export.embedder_options import EmbedderOptions
from megatron_cocoa.export.folder import export_embedder
from tests.distributed.tiny_run import write_folders
from tests.parity.reference import cast_parameters

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Folders:
    """``hf`` is written by transformers (causal, as published), ``exported`` by this project."""

    root: Path
    hf: Path
    checkpoint: Path
    exported: Path


def write_exported(
    root: Path,
    *,
    family: str = "qwen2_5_vl",
    dtype: torch.dtype = torch.float32,
    options: EmbedderOptions = EmbedderOptions("sentence-transformers"),
) -> Folders:
    """Every parameter is random: fresh biases are zero and norms one, which would hide exchanges."""
    write_folders(root)
    model = _model(root / "model", family)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = float(parameter.dim() == 1 and "norm" in name)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + centre)
    folders = Folders(root, root / "hf", root / "checkpoint", root / "exported")
    cast_parameters(model, dtype).save_pretrained(folders.hf)
    for name in TOKENIZER_FILES:
        shutil.copy(root / "model" / name, folders.hf)
    convert_hf_to_mcore(folders.hf, folders.checkpoint)
    export_embedder(folders.checkpoint, folders.exported, options=options)
    return folders


def _model(folder: Path, family: str) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(folder)
    if family == "qwen2_5_vl":
        return Qwen2_5_VLForConditionalGeneration(config)
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")
    text = config.text_config.to_dict()
    vision = dict(
        depth=2, embed_dim=32, hidden_size=text["hidden_size"], mlp_ratio=2, num_heads=4,
        patch_size=config.vision_config.patch_size,
    )  # fmt: skip
    text.pop("model_type")
    other = Qwen2VLConfig(text_config=text, vision_config=vision, **{name: getattr(config, name) for name in ids})
    return Qwen2VLForConditionalGeneration(other)
