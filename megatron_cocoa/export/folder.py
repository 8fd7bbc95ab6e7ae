"""From a Megatron checkpoint to a folder that embeds: weights, tokenizer, model card and golden vectors, or nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from megatron_cocoa.checkpoint.export import ExportReport
from megatron_cocoa.checkpoint.placement import check_target, new_folder
from megatron_cocoa.checkpoint.store import INFO_FILE, read_info
from megatron_cocoa.conversion.hf_to_mcore import UNKNOWN_TOKEN
from megatron_cocoa.conversion.mcore_to_hf import convert_mcore_to_hf
from megatron_cocoa.embedder import CocoaEmbedder
from megatron_cocoa.export.export_info import DEFAULT_BRIDGE, make_bidirectional
from megatron_cocoa.export.golden import write_golden
from megatron_cocoa.export.model_card import model_card
from megatron_cocoa.export.sentence_transformers_files import write_modules

FORMATS = ("hf", "sentence-transformers")
_NEEDED = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")


def export_embedder(
    mcore_path: str | Path,
    output_path: str | Path,
    *,
    model_path: str | Path,
    format: Literal["hf", "sentence-transformers"] = "hf",
    dtype: torch.dtype | None = None,
    bridge_token: str = DEFAULT_BRIDGE,
    overwrite: bool = False,
) -> ExportReport:
    """Write a checkpoint as a folder that other libraries load as the bidirectional embedding model.

    The golden vectors are computed by this project's model in fp32, which takes the memory of one such model.

    Args:
        mcore_path: complete checkpoint of any layout and stage.
        output_path: folder to create.
        model_path: Hugging Face folder whose configuration, tokenizer and processor files go along.
        format: ``hf``, or ``sentence-transformers`` for the same folder with that library's modules.
        dtype: of the weights on disk; None keeps the checkpoint's.
        bridge_token: token that carries the embedding.
        overwrite: replace an earlier model folder at ``output_path``.

    Raises:
        ValueError: for anything that does not fit; nothing is left at the target then.
    """
    source, target = Path(mcore_path), Path(output_path).absolute()
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, needs one of {', '.join(FORMATS)}")
    missing = [name for name in _NEEDED if not (Path(model_path) / name).is_file()]
    if missing:
        raise ValueError(f"{model_path} lacks {', '.join(missing)}: name the model's Hugging Face folder as model_path")
    for origin in (source, Path(model_path)):
        check_target(target, origin, marker="config.json", kind="model folder", overwrite=overwrite)
    with new_folder(target) as work:
        # Readers refuse a folder under its incomplete name, so the model is made one level below it.
        folder = work / "model"
        report = convert_mcore_to_hf(source, folder, companions=model_path, dtype=dtype)
        trained_with = read_info(source).bridge_token_id if (source / INFO_FILE).is_file() else UNKNOWN_TOKEN
        _complete(folder, format=format, bridge_token=bridge_token, trained_with=trained_with)
        for entry in list(folder.iterdir()):
            entry.rename(work / entry.name)
        folder.rmdir()
    return replace(report, path=target)


def _complete(folder: Path, *, format: str, bridge_token: str, trained_with: int) -> None:
    config = make_bidirectional(folder, bridge_token=bridge_token)
    # The published template would put a conversation's markers between the text and the bridge.
    for name in ("chat_template.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    hidden_size = config["text_config"]["hidden_size"]
    with_modules = format == "sentence-transformers"
    if with_modules:
        write_modules(folder, hidden_size=hidden_size, bridge_token=bridge_token)
    card = model_card(
        model_type=config["model_type"],
        hidden_size=hidden_size,
        bridge_token=bridge_token,
        default_bridge=bridge_token == DEFAULT_BRIDGE,
        sentence_transformers=with_modules,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    embedder = CocoaEmbedder.from_pretrained(folder)
    found = embedder.builder.bundle.bridge_token_id
    if trained_with not in (UNKNOWN_TOKEN, found):
        raise ValueError(
            f"the checkpoint was trained with the bridge token's id {trained_with}, {bridge_token} has {found} in the "
            f"tokenizer: name the run's bridge token and its own model folder"
        )

    def embed(text: str, image: Image.Image | None) -> np.ndarray:
        return embedder.encode([{"text": text, "image": image}])[0]

    write_golden(folder, embed)
