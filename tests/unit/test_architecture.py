"""What is read from a ``config.json`` and what is refused."""

from __future__ import annotations

import copy

import pytest

from megatron_cocoa.architecture import QwenVLArchitecture, VisionGeometry
from tests.parity.reference import tiny_config

FAMILIES = pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])


@FAMILIES
def test_numbers_that_all_published_sizes_share_are_read_too(family):
    """Claim: what a model of one's own may have otherwise is not taken for what Qwen published."""
    config = tiny_config(family)
    vision, text = config.vision_config, config.text_config
    vision.in_channels, vision.temporal_patch_size, vision.spatial_merge_size = 4, 3, 1
    vision.rope_parameters = vision.rope_parameters | {"rope_theta": 500.0}
    text.rope_parameters = text.rope_parameters | {"rope_theta": 2000.0, "mrope_section": [1, 2, 1]}
    found = QwenVLArchitecture.from_huggingface(config)
    assert (found.vision.in_channels, found.vision.temporal_patch_size, found.vision.spatial_merge_size) == (4, 3, 1)
    assert (found.vision.rope_theta, found.text.rope_theta, found.text.mrope_section) == (500.0, 2000.0, (1, 2, 1))
    if family == "qwen2_5_vl":
        vision.tokens_per_second = 4
        assert QwenVLArchitecture.from_huggingface(config).vision.tokens_per_second == 4


@FAMILIES
@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("text_config", dict(rope_parameters={"rope_type": "yarn", "mrope_section": [1, 1, 2]}), "rope_type 'yarn'"),
        ("text_config", dict(use_sliding_window=True), "use_sliding_window is true: .* set it to false"),
        ("text_config", dict(rope_parameters={"mrope_section": [1, 1, 1]}), r"\(1, 1, 1\) must sum to half of .* 8"),
        ("text_config", dict(hidden_size=128), "the tower emits 64 features, the language model takes 128"),
        ("vision_config", dict(hidden_act="gelu"), "hidden_act is 'gelu', .* with '(silu|quick_gelu)'"),
    ],
)
def test_what_is_not_computed_here_is_refused(family, part, changes, message):
    """Claim: a model that this code would compute otherwise than Hugging Face is one message, not another model."""
    config = copy.deepcopy(tiny_config(family))
    for name, value in changes.items():
        setattr(getattr(config, part), name, value)
    if "hidden_size" in changes:
        config.text_config.num_attention_heads = 16
    with pytest.raises(ValueError, match=message):
        QwenVLArchitecture.from_huggingface(config)


@pytest.mark.parametrize("name", ["patch_size", "temporal_patch_size", "spatial_merge_size", "in_channels"])
def test_a_tower_without_extent_is_refused(name):
    """Claim: zero would divide by itself, far from its cause."""
    numbers = dict(patch_size=14, temporal_patch_size=2, spatial_merge_size=2, in_channels=3)
    with pytest.raises(ValueError, match=f"{name} is 0, needs 1 or more"):
        VisionGeometry(**numbers | {name: 0})
