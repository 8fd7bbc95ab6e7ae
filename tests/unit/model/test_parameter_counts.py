"""Published sizes: as many parameters as Hugging Face's models, built without memory on the meta device."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.config import ModelSettings, ParallelSettings, RecomputeSettings
from megatron_cocoa.model.qwen_vl import QwenVL
from megatron_cocoa.model.specs import build_provider
from megatron_cocoa.model.transformer_configs import ModelConfigs, build_configs

PUBLISHED = json.loads((Path(__file__).parents[1] / "checkpoint" / "published_configs.json").read_text())
CLASSES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
}


def count(module: torch.nn.Module) -> int:
    """Parameters, each shared one once."""
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_hugging_faces_parameters(single_rank, name):
    """Claim: both families at every published size, without a line of code that knows a size."""
    published = PUBLISHED[name]
    config_class, model_class = CLASSES[published["model_type"]]
    config = config_class(**{key: published[key] for key in ("text_config", "vision_config", "tie_word_embeddings")})
    architecture = QwenVLArchitecture.from_huggingface(config)
    settings = ModelSettings(transformer_impl="local", make_vocab_size_divisible_by=1)
    configs = build_configs(
        architecture, model=settings, parallel=ParallelSettings(), recompute=RecomputeSettings()
    )
    # Megatron's path for the CPU names no device, so that the device of the context holds everything.
    parts = {f.name: getattr(configs, f.name) for f in fields(ModelConfigs)}
    on_no_device = {name: replace(part, use_cpu_initialization=True) for name, part in parts.items()}
    with torch.device("meta"):
        ours = QwenVL(architecture, ModelConfigs(**on_no_device), build_provider(settings), vocab_multiple=1)
        theirs = model_class(config)
    assert all(p.is_meta for p in ours.parameters())
    assert count(ours) == count(theirs) == published["num_parameters"]
