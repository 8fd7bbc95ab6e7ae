"""From a Megatron checkpoint to a folder that embeds: weights, tokenizer, model card and golden vectors, or nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.checkpoint.export import ExportReport
from megatron_cocoa.checkpoint.placement import check_target, new_folder
from megatron_cocoa.checkpoint.store import IMPORT_STAGE, INFO_FILE, read_info
from megatron_cocoa.config import EmbeddingForm
from megatron_cocoa.conversion.companions import find_companions, run_settings
from megatron_cocoa.conversion.hf_to_mcore import UNKNOWN_TOKEN, read_config
from megatron_cocoa.conversion.mcore_to_hf import NO_TOKENIZER, convert_mcore_to_hf
from megatron_cocoa.embedder import CocoaEmbedder
from megatron_cocoa.export.export_info import DEFAULT_BRIDGE, ExportInfo, make_embedding_config
from megatron_cocoa.export.golden import write_golden
from megatron_cocoa.export.model_card import model_card
from megatron_cocoa.export.sentence_transformers_files import write_modules

_NEEDED = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class EmbedderOptions:
    """How an exported embedding model takes its inputs.

    Args:
        format: ``hf``, or ``sentence-transformers`` for the same folder with that library's modules.
        bridge_token: token that carries the embedding; None for the run's, else ``<|im_end|>``.
        image_size: side in pixels of the square that pictures are resized to; None keeps their shape.
        golden: compute ``golden.json``, in fp32 by this project's model, which takes the memory of one such model.

    Raises:
        ValueError: for an unknown format, or a fixed picture size in one that cannot express it.
    """

    format: Literal["hf", "sentence-transformers"] = "hf"
    bridge_token: str | None = None
    image_size: int | None = None
    golden: bool = True

    def __post_init__(self) -> None:
        if self.format not in ("hf", "sentence-transformers"):
            raise ValueError(f"format is {self.format!r}, needs hf or sentence-transformers")
        if self.image_size is not None and self.format == "sentence-transformers":
            raise ValueError(
                f"image_size {self.image_size} cannot be exported for sentence-transformers: it prepares pictures with "
                f"transformers' Qwen2VLImageProcessor, which keeps a picture's shape under every setting "
                f"(shortest_edge and longest_edge bound the area), and a folder may carry no code. Leave the size out "
                f"and resize pictures before encode, or export with --format hf"
            )


def default_format(mcore_path: str | Path) -> Literal["plain", "hf"]:
    """``hf``, the embedding model, for a checkpoint that a stage has trained; ``plain`` for converted weights."""
    source = Path(mcore_path)
    trained = (source / INFO_FILE).is_file() and read_info(source).stage != IMPORT_STAGE
    return "hf" if trained else "plain"


def export_embedder(
    mcore_path: str | Path,
    output_path: str | Path,
    *,
    companions: str | Path | None = None,
    options: EmbedderOptions = EmbedderOptions(),
    overwrite: bool = False,
    **conversion: Any,
) -> ExportReport:
    """Write a checkpoint as a folder that other libraries load as the embedding model, in the form it was trained in.

    Args:
        mcore_path: complete checkpoint of any layout and stage.
        output_path: folder to create.
        companions: Hugging Face folder whose configuration, tokenizer and processor files go along; None takes what
            the checkpoint carries, or its run's settings name.
        options: how the model takes its inputs.
        overwrite: replace an earlier model folder at ``output_path``.
        conversion: of the weights, as ``convert_mcore_to_hf`` takes it (``dtype``, ``spelling``, ...).

    Raises:
        ValueError: for anything that does not fit; nothing is left at the target then.
    """
    source, target = Path(mcore_path), Path(output_path).absolute()
    found = Path(companions) if companions is not None else find_companions(source)
    missing = [name for name in _NEEDED if found is None or not (found / name).is_file()]
    # A folder that was named must be whole, and sentence-transformers loads nothing without a tokenizer.
    if missing and (companions is not None or options.format == "sentence-transformers"):
        raise ValueError(
            f"{found or source} lacks {', '.join(missing)}: name the model's Hugging Face folder with --companions"
        )
    for origin in (source, *([found] if found is not None else [])):
        check_target(target, origin, marker="config.json", kind="model folder", overwrite=overwrite)
    with new_folder(target) as work:
        # Readers refuse a folder under its incomplete name, so the model is made one level below it.
        folder = work / "model"
        report = convert_mcore_to_hf(source, folder, companions=found, **conversion)
        lines = _complete(folder, source, options, missing)
        for entry in list(folder.iterdir()):
            entry.rename(work / entry.name)
        folder.rmdir()
    left_out = [line for line in report.left_out if line != NO_TOKENIZER]
    return replace(report, path=target, left_out=(*left_out, *lines))


def _complete(folder: Path, source: Path, options: EmbedderOptions, missing: list[str]) -> list[str]:
    """Make the model folder an embedding model, and say what it lacks."""
    info = read_info(source) if (source / INFO_FILE).is_file() else None
    settings = run_settings(source)
    bridge_token = options.bridge_token or (settings.get("model") or {}).get("bridge_token") or DEFAULT_BRIDGE
    _check_image_size(options.image_size, folder)
    form = EmbeddingForm() if info is None else info.embedding_form
    if form.image_placeholder == "bare" and options.format == "sentence-transformers":
        raise ValueError(
            f"{source} was trained with contrastive.image_placeholder bare, which cannot be exported for "
            f"sentence-transformers: with it transformers gives pictures positions in rows and columns, bare ones have "
            f"none. Export with --format hf"
        )
    config = make_embedding_config(folder, ExportInfo(bridge_token, options.image_size, form))
    # The published template would put a conversation's markers between the text and the bridge.
    for name in ("chat_template.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    hidden_size = config["text_config"]["hidden_size"]
    with_modules = options.format == "sentence-transformers"
    if with_modules:
        write_modules(folder, hidden_size=hidden_size, bridge_token=bridge_token)
    with_golden = options.golden and not missing
    card = model_card(
        model_type=config["model_type"],
        hidden_size=hidden_size,
        bridge_token=bridge_token,
        default_bridge=bridge_token == DEFAULT_BRIDGE,
        sentence_transformers=with_modules,
        image_size=options.image_size,
        golden=with_golden,
        form=form,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    if not missing and info is not None:
        _check_bridge(folder, bridge_token, info.bridge_token_id)
    if with_golden:
        _golden(folder)
    stage = "" if info is None else info.stage
    return _lines(options, missing, stage, (settings.get(stage) or {}).get("image_size"))


def _lines(options: EmbedderOptions, missing: list[str], stage: str, trained_size: int | None) -> list[str]:
    lines = []
    if missing:
        lines.append(f"{', '.join(missing)}, and with them golden.json: --companions names the folder that has them")
    elif not options.golden:
        lines.append("golden.json, as asked: this installation and others cannot be compared")
    if trained_size is not None and options.image_size is None:
        lines.append(
            f"the picture size of the training: stage {stage} resized pictures to {trained_size} x {trained_size}, the "
            f"folder keeps their shape; --format hf --image-size {trained_size} resizes them"
        )
    return lines


def _check_image_size(image_size: int | None, folder: Path) -> None:
    vision = QwenVLArchitecture.from_huggingface(read_config(folder)).vision
    factor = vision.patch_size * vision.spatial_merge_size
    if image_size is not None and (image_size < 1 or image_size % factor):
        raise ValueError(f"image_size {image_size} is not a multiple of {factor} pixels (patch size x merge size)")


def _check_bridge(folder: Path, bridge_token: str, trained_with: int) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    found = tokenizer.get_vocab().get(bridge_token)
    if trained_with not in (UNKNOWN_TOKEN, found):
        raise ValueError(
            f"the checkpoint was trained with the bridge token's id {trained_with}, {bridge_token} has {found} in the "
            f"tokenizer: name the run's --bridge-token and its own model folder"
        )


def _golden(folder: Path) -> None:
    embedder = CocoaEmbedder.from_pretrained(folder)

    def embed(text: str, image: Image.Image | None) -> np.ndarray:
        return embedder.encode([{"text": text, "image": image}])[0]

    write_golden(folder, embed)
