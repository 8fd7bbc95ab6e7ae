"""What an exported folder's ``config.json`` says beyond the architecture."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cocoa.config import EmbeddingForm
from megatron_cocoa.conversion.embedding_form import PLACEHOLDER_KEY, form_of_config
from megatron_cocoa.conversion.hf_to_mcore import config_of
from megatron_cocoa.conversion.picture_sizes import IMAGE_SIZE_KEY
from megatron_cocoa.data.preprocess import limits_in_pixels, load_processor, processor_file
from megatron_cocoa.recipes.embedding_model import BRIDGE_KEY

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


def write_image_limits(folder: Path, *, min_tokens: int | None, max_tokens: int | None) -> None:
    """Write limits of a picture's merged units where the folder describes its image processor; None keeps its own.

    They are pixels there. transformers, sentence-transformers and this project read that file, see ``processor_file``,
    so that no library needs to be told. A folder without one is left as it is.

    Raises:
        ValueError: if the smallest picture would be larger than the largest.
    """
    file = processor_file(folder)
    if file is None or min_tokens is max_tokens is None:
        return
    low, high = limits_in_pixels(load_processor(folder), min_tokens=min_tokens, max_tokens=max_tokens)
    content = json.loads(file.read_text(encoding="utf-8"))
    described = content.get("image_processor", content)
    # Published files name the same limits twice, and the older names win where transformers finds them.
    older = {name: value for name, value in (("min_pixels", low), ("max_pixels", high)) if name in described}
    described.update({"size": {"shortest_edge": low, "longest_edge": high}, **older})
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
