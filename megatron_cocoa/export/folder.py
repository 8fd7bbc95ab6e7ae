"""From a Megatron checkpoint to a folder that embeds: weights, tokenizer, model card and golden vectors, or nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from megatron_cocoa.checkpoint.export import ExportReport
from megatron_cocoa.checkpoint.info import INFO_FILE, read_info
from megatron_cocoa.checkpoint.placement import check_target, new_folder
from megatron_cocoa.config import EmbeddingForm
from megatron_cocoa.conversion.companions import find_companions, run_settings
from megatron_cocoa.conversion.hf_to_mcore import UNKNOWN_TOKEN, read_architecture
from megatron_cocoa.conversion.mcore_to_hf import NO_TOKENIZER, convert_mcore_to_hf
from megatron_cocoa.conversion.memory import check_fp32_memory, size_of_checkpoint
from megatron_cocoa.conversion.picture_sizes import PictureSizes
from megatron_cocoa.data.preprocess import check_image_size, processor_file
from megatron_cocoa.export.check_golden import with_megatron_cocoa
from megatron_cocoa.export.embedder_options import EmbedderOptions
from megatron_cocoa.export.export_info import (
    DEFAULT_BRIDGE,
    ExportInfo,
    make_embedding_config,
    write_image_limits,
)
from megatron_cocoa.export.golden import GOLDEN_FILE, write_golden
from megatron_cocoa.export.model_card import model_card
from megatron_cocoa.export.sentence_transformers_files import write_modules

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


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
    missing = _missing(found)
    # A folder that was named must be whole, and sentence-transformers loads nothing without a tokenizer.
    if missing and (companions is not None or options.format == "sentence-transformers"):
        raise ValueError(
            f"{found or source} lacks {', '.join(missing)}: name the model's Hugging Face folder with --companions"
        )
    for origin in (source, *([found] if found is not None else [])):
        check_target(target, origin, marker="config.json", kind="model folder", overwrite=overwrite)
    if options.golden and not missing:
        check_fp32_memory(
            size_of_checkpoint(source).num_parameters,
            what=GOLDEN_FILE,
            instead="leave it out with --no-golden, or export where there is more memory",
        )
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


def _missing(companions: Path | None) -> list[str]:
    """What a model folder lacks for embedding."""
    missing = [name for name in _TOKENIZER_FILES if companions is None or not (companions / name).is_file()]
    has_processor = companions is not None and processor_file(companions) is not None
    return missing if has_processor else [*missing, "preprocessor_config.json"]


def _complete(folder: Path, source: Path, options: EmbedderOptions, missing: list[str]) -> list[str]:
    """Make the model folder an embedding model, and say what it lacks."""
    info = read_info(source) if (source / INFO_FILE).is_file() else None
    own = PictureSizes() if info is None else PictureSizes.of_checkpoint(source, info)
    form = EmbeddingForm() if info is None else info.embedding_form
    sizes = options.sizes(own)
    saved_model = run_settings(source).get("model") or {}
    bridge_token = options.bridge_token or saved_model.get("bridge_token") or DEFAULT_BRIDGE
    check_image_size(sizes.image_size, read_architecture(folder).vision)
    _check_form(form, options, source)
    if not missing and info is not None:
        _check_bridge(folder, bridge_token, info.bridge_token_id)

    if sizes.image_size is None:
        write_image_limits(folder, min_tokens=sizes.min_image_tokens, max_tokens=sizes.max_image_tokens)
    config = make_embedding_config(folder, ExportInfo(bridge_token, sizes.image_size, form))
    hidden_size = config["text_config"]["hidden_size"]
    _remove_chat_template(folder)
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
        image_size=sizes.image_size,
        golden=with_golden,
        form=form,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    if with_golden:
        write_golden(folder, with_megatron_cocoa(folder))

    lines = _lines(options, missing)
    if own.image_size not in (None, sizes.image_size):
        lines.append(_departure(options, "" if info is None else info.stage, own.image_size, sizes.image_size))
    return lines


def _check_form(form: EmbeddingForm, options: EmbedderOptions, source: Path) -> None:
    if form.image_placeholder == "bare" and options.format == "sentence-transformers":
        raise ValueError(
            f"{source} was trained with contrastive.image_placeholder bare, which cannot be exported for "
            f"sentence-transformers: with it transformers gives pictures positions in rows and columns, bare ones have "
            f"none. Export with --format hf"
        )


def _remove_chat_template(folder: Path) -> None:
    """The published template, which would put a conversation's markers between the text and the bridge."""
    for name in ("chat_template.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    for file in (folder / "tokenizer_config.json", folder / "processor_config.json"):
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if content.pop("chat_template", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _lines(options: EmbedderOptions, missing: list[str]) -> list[str]:
    lines = []
    if missing:
        lines.append(f"{', '.join(missing)}, and with them golden.json: --companions names the folder that has them")
    elif not options.golden:
        lines.append("golden.json, as asked: this installation and others cannot be compared")
    return lines


def _departure(options: EmbedderOptions, stage: str, own: int, exported: int | None) -> str:
    does = "keeps their shape" if exported is None else f"resizes them to {exported} x {exported}"
    why = ", as asked" if options.format == "hf" else "; --format hf resizes them, too"
    return f"the picture size of the training: stage {stage} resized pictures to {own} x {own}, the folder {does}{why}"


def _check_bridge(folder: Path, bridge_token: str, trained_with: int) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    found = tokenizer.get_vocab().get(bridge_token)
    if trained_with not in (UNKNOWN_TOKEN, found):
        raise ValueError(
            f"the checkpoint was trained with the bridge token's id {trained_with}, {bridge_token} has {found} in the "
            f"tokenizer: name the run's --bridge-token and its own model folder"
        )
