"""Tiny random Qwen2-VL and Qwen2.5-VL models of Hugging Face, and their folders in every form that is found on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from megatron_cocoa.checkpoint.mapping import flat_spelling, nested_spelling

CLASSES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
}
# Sizes differ, so that a swapped pair of dimensions cannot pass a shape check by chance. Qwen2.5-VL's tower ffn is
# even but not divisible by 4, like the published 3420 at tensor parallel degree 8.
TEXT = dict(
    vocab_size=52, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e6},
)  # fmt: skip
VISION = {
    "qwen2_vl": dict(depth=2, embed_dim=24, num_heads=4, mlp_ratio=3, hidden_size=32, patch_size=4),
    "qwen2_5_vl": dict(
        depth=2, hidden_size=24, num_heads=4, intermediate_size=66, out_hidden_size=32, patch_size=4,
        fullatt_block_indexes=[1],
    ),
}  # fmt: skip


def build_config(model_type: str, *, tied: bool):
    return CLASSES[model_type][0](text_config=TEXT, vision_config=VISION[model_type], tie_word_embeddings=tied)


def build_model(model_type: str, *, tied: bool, dtype: torch.dtype = torch.float32):
    """A model whose every parameter is random: fresh biases are zero and norms one, which would hide exchanges."""
    torch.manual_seed(7)
    model = CLASSES[model_type][1](build_config(model_type, tied=tied)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model


def flat_state(model) -> dict[str, torch.Tensor]:
    """Weights under the published names; a tied head is left out, as in published files."""
    state = {flat_spelling(name): tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def write_folder(path: Path, state: dict, config=None, *, spelling: str = "flat", num_files: int = 1) -> Path:
    """Write ``state`` (flat names) with the safetensors package, not with the writer under test."""
    path.mkdir(parents=True)
    if config is not None:
        config.save_pretrained(path)
    spell = nested_spelling if spelling == "nested" else str
    state = {spell(name): tensor.clone() for name, tensor in state.items()}
    if num_files == 1:
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        return path
    names = sorted(state)
    weight_map = {}
    for i in range(num_files):
        file = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
        part = {name: state[name] for name in names[i::num_files]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl"])
def model_type(request) -> str:
    return request.param


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request) -> bool:
    return request.param


@pytest.fixture(scope="session")
def tiny():
    """The helpers above, for tests that cannot import a conftest."""

    class Helpers:
        config = staticmethod(build_config)
        model = staticmethod(build_model)
        state = staticmethod(flat_state)
        write = staticmethod(write_folder)
        classes = CLASSES

    return Helpers
