"""What an exported folder's ``config.json`` says beyond the architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_cocoa.conversion.hf_to_mcore import config_of
from megatron_cocoa.embedder import BRIDGE_KEY, IMAGE_SIZE_KEY

DEFAULT_BRIDGE = "<|im_end|>"


def make_bidirectional(folder: Path, *, bridge_token: str, image_size: int | None = None) -> dict[str, Any]:
    """Rewrite ``config.json`` of a model folder as that of an embedding model, and return it.

    transformers reads ``is_causal`` of the text model's configuration, under every attention implementation.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    # Published configurations are flat: their text fields stand beside vision_config, and is_causal is then
    # not read by the text model.
    config["text_config"] = _text_fields(config) | {"is_causal": False}
    config[BRIDGE_KEY] = bridge_token
    config.pop(IMAGE_SIZE_KEY, None)
    if image_size is not None:
        config[IMAGE_SIZE_KEY] = image_size
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return config


def _text_fields(config: dict[str, Any]) -> dict[str, Any]:
    if isinstance(config.get("text_config"), dict):
        return config["text_config"]
    return config_of(config, origin="config.json").to_dict()["text_config"]


def read_export_info(folder: Path) -> tuple[str, int | None]:
    """The token that carries the embedding of an exported folder, and the side of its pictures where it is fixed.

    Raises:
        ValueError: if the folder has no readable ``config.json``.
    """
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return content.get(BRIDGE_KEY, DEFAULT_BRIDGE), content.get(IMAGE_SIZE_KEY)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): needed a folder of tools/convert_mcore_to_hf.py") from error
