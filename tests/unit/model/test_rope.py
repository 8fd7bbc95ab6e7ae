"""Rotary tables against Hugging Face's rotary modules."""

import pytest
import torch

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.model.rope import mrope_tables, vision_tables
from tests.parity import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mrope_tables_are_hugging_faces(tiny, dtype):
    """Claim: each channel turns with the axis that Hugging Face gives it, in FP32 before the cast: bit for bit."""
    positions = torch.randint(0, 400, (3, 50), generator=torch.Generator().manual_seed(0))
    text = QwenVLArchitecture.from_huggingface(tiny.huggingface.config).text
    rotary = tiny.huggingface.model.language_model.rotary_emb
    for found, wanted in zip(
        mrope_tables(positions, text, dtype), rotary(torch.zeros(1, dtype=dtype), positions[:, None])
    ):
        assert found.dtype == dtype
        # Hugging Face's tables hold each half of the channels twice.
        assert torch.equal(torch.cat([found, found], dim=-1), wanted[0])


def test_vision_tables_are_hugging_faces(tiny):
    """Claim: the tower's channels turn with height, then with width, as in Hugging Face's tower, in FP32."""
    vision = QwenVLArchitecture.from_huggingface(tiny.huggingface.config).vision
    positions = torch.randint(0, 60, (40, 2), generator=torch.Generator().manual_seed(0))
    rotary = tiny.huggingface.model.visual.rotary_pos_emb
    for found, wanted in zip(vision_tables(positions, vision), rotary(torch.zeros(1), positions)):
        assert found.dtype == torch.float32
        assert torch.equal(torch.cat([found, found], dim=-1), wanted)


def test_text_turns_all_axes_alike():
    """Claim: for text, where the three axes agree, M-RoPE is plain rotary embedding."""
    text = QwenVLArchitecture.from_huggingface(reference.tiny_config("qwen2_5_vl")).text
    cos, _ = mrope_tables(torch.arange(20).expand(3, 20), text, torch.float32)
    angles = torch.arange(20)[:, None] * text.rope_theta ** -(torch.arange(0, text.head_dim, 2) / text.head_dim)
    # Angles up to 20: their rounding in float32 is near 2e-6.
    assert torch.allclose(cos, angles.cos(), atol=1e-5)
