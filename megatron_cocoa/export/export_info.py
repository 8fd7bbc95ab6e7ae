"""What an exported folder's ``config.json`` says beyond the architecture."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cocoa.config import EmbeddingForm
from megatron_cocoa.conversion.embedding_form import PLACEHOLDER_KEY, form_of_config
from megatron_cocoa.conversion.hf_to_mcore import config_of
from megatron_cocoa.embedder import BRIDGE_KEY, IMAGE_SIZE_KEY

DEFAULT_BRIDGE = "<|im_end|>"


@dataclass(frozen=True)
class ExportInfo:
    """How an exported folder embeds.

    bridge_token: carries the embedding.
    image_size:   side in pixels of the square that pictures are resized to; None where they keep their shape.
    form:         attention, and what stands for a picture.
    """

    bridge_token: str
    image_size: int | None
    form: EmbeddingForm


def make_embedding_config(folder: Path, info: ExportInfo) -> dict[str, Any]:
    """Rewrite ``config.json`` of a model folder as that of an embedding model, and return it.

    transformers reads ``is_causal`` of the text model's configuration, under every attention implementation.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    # Published configurations are flat: their text fields stand beside vision_config, and is_causal is then
    # not read by the text model.
    config["text_config"] = _text_fields(config) | {"is_causal": info.form.attention == "causal"}
    config[BRIDGE_KEY] = info.bridge_token
    for key in (IMAGE_SIZE_KEY, PLACEHOLDER_KEY):
        config.pop(key, None)
    if info.image_size is not None:
        config[IMAGE_SIZE_KEY] = info.image_size
    if info.form.image_placeholder != "full":
        config[PLACEHOLDER_KEY] = info.form.image_placeholder
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return config


def _text_fields(config: dict[str, Any]) -> dict[str, Any]:
    if isinstance(config.get("text_config"), dict):
        return config["text_config"]
    return config_of(config, origin="config.json").to_dict()["text_config"]


def read_export_info(folder: Path) -> ExportInfo:
    """How an exported folder embeds.

    Raises:
        ValueError: if the folder has no readable ``config.json``.
    """
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return ExportInfo(
            content.get(BRIDGE_KEY, DEFAULT_BRIDGE), content.get(IMAGE_SIZE_KEY), form_of_config(content)
        )
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): needed a folder of tools/convert_mcore_to_hf.py") from error
