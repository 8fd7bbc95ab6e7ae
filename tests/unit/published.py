"""Architectures of the published sizes, from their ``config.json`` numbers."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from transformers import Qwen2_5_VLConfig, Qwen2VLConfig

from megatron_cocoa.architecture import QwenVLArchitecture

PUBLISHED = json.loads((Path(__file__).parent / "checkpoint" / "published_configs.json").read_text())
CONFIG_CLASSES = {"qwen2_vl": Qwen2VLConfig, "qwen2_5_vl": Qwen2_5_VLConfig}


@functools.lru_cache
def published_architecture(name: str) -> QwenVLArchitecture:
    """Of ``Qwen2.5-VL-7B`` and the like."""
    published = PUBLISHED[name]
    parts = {key: published[key] for key in ("text_config", "vision_config", "tie_word_embeddings")}
    return QwenVLArchitecture.from_huggingface(CONFIG_CLASSES[published["model_type"]](**parts))
