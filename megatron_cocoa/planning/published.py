"""Shapes of the published sizes, so that a run can be planned before its checkpoint is at hand.

From the ``config.json`` of each checkpoint. Nothing is built from this table: training reads the model folder.
"""

from __future__ import annotations

from megatron_cocoa.architecture import QwenVLArchitecture, TextArchitecture, VisionArchitecture

_TEXT = {
    # hidden, ffn, layers, heads, key-value heads, vocabulary, tied
    "qwen2-vl-2b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2-vl-7b": (3584, 18944, 28, 28, 4, 152064, False),
    "qwen2-vl-72b": (8192, 29568, 80, 64, 8, 152064, False),
    "qwen2.5-vl-3b": (2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-vl-7b": (3584, 18944, 28, 28, 4, 152064, False),
    "qwen2.5-vl-32b": (5120, 27648, 64, 40, 8, 152064, False),
    "qwen2.5-vl-72b": (8192, 29568, 80, 64, 8, 152064, False),
}
_WIDE_TOWER = ("qwen2.5-vl-32b", "qwen2.5-vl-72b")

PUBLISHED_SIZES = tuple(_TEXT)
"""Names of the sizes; each is a preset's too."""


def published_architecture(name: str) -> QwenVLArchitecture:
    """The architecture of a published size, such as ``qwen2.5-vl-7b``.

    Raises:
        ValueError: for another name.
    """
    if name not in _TEXT:
        raise ValueError(f"{name!r} is no published size: choose from {', '.join(PUBLISHED_SIZES)}, or a model folder")
    hidden, ffn, layers, heads, groups, vocabulary, tied = _TEXT[name]
    text = TextArchitecture(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
        mrope_section=(16, 24, 24),
        max_position_embeddings=128_000,
    )
    return QwenVLArchitecture(
        model_type="qwen2_vl" if name.startswith("qwen2-") else "qwen2_5_vl",
        vision=_tower(name, out_hidden_size=hidden),
        text=text,
        tie_word_embeddings=tied,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )


def _tower(name: str, *, out_hidden_size: int) -> VisionArchitecture:
    shared = dict(
        depth=32,
        hidden_size=1280,
        num_heads=16,
        out_hidden_size=out_hidden_size,
        in_channels=3,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        rope_theta=10_000.0,
    )
    if name.startswith("qwen2-"):
        return VisionArchitecture(
            **shared, intermediate_size=5120, normalization="LayerNorm", activation="quick_gelu", gated=False
        )
    return VisionArchitecture(
        **shared,
        intermediate_size=3456 if name in _WIDE_TOWER else 3420,
        normalization="RMSNorm",
        activation="silu",
        gated=True,
        window_size=112,
        fullatt_block_indexes=(7, 15, 23, 31),
        tokens_per_second=2,
    )
