"""The architecture of a Qwen2-VL or Qwen2.5-VL model, read from Hugging Face's ``config.json``.

The two families differ in their tower alone (norm, MLP, windows) and in how video time scales; every size of
both is these numbers, so no code below knows a size or a release by name beyond this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MERGER_EPSILON = 1e-6
"""Norm epsilon of both towers and mergers: a constant in Hugging Face's code, not a field of its config."""


@dataclass(frozen=True, kw_only=True)
class VisionGeometry:
    """The few numbers of the tower that decide how many tokens a picture takes, and where they go.

    patch_size:          side of a square patch in pixels.
    temporal_patch_size: frames per patch; a still picture is repeated this often.
    spatial_merge_size:  a merged unit, that is one placeholder token, is this many patches square.
    tokens_per_second:   steps of the time axis of M-RoPE per second of video (Qwen2.5-VL); None where video frames
                         count one step each (Qwen2-VL).
    in_channels:         colour channels.
    """

    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    tokens_per_second: float | None = None
    in_channels: int = 3

    def __post_init__(self) -> None:
        for name in ("patch_size", "temporal_patch_size", "spatial_merge_size", "in_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, needs 1 or more")

    @property
    def patch_dim(self) -> int:
        """Values of one patch, a row of ``pixel_values``: channels x frames x pixels."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def patches_per_unit(self) -> int:
        """Consecutive rows of ``pixel_values`` that make one merged unit."""
        return self.spatial_merge_size**2

    @property
    def unit_dim(self) -> int:
        """Values of one merged unit."""
        return self.patches_per_unit * self.patch_dim

    @property
    def size_factor(self) -> int:
        """Picture sides are multiples of this many pixels."""
        return self.patch_size * self.spatial_merge_size

    def num_units(self, grid_thw: tuple[int, int, int]) -> int:
        """Placeholder tokens of a picture or video of ``grid_thw`` patches."""
        t, h, w = grid_thw
        return t * h * w // self.patches_per_unit


@dataclass(frozen=True, kw_only=True)
class VisionArchitecture(VisionGeometry):
    """The tower.

    window_size:           side of an attention window in pixels; None where every block sees its whole frame.
    fullatt_block_indexes: 0-based blocks that see the whole frame in spite of windows.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    rope_theta: float
    normalization: Literal["RMSNorm", "LayerNorm"]
    activation: Literal["silu", "quick_gelu"]
    gated: bool
    window_size: int | None = None
    fullatt_block_indexes: tuple[int, ...] = ()

    @property
    def window_units(self) -> int | None:
        """Side of a window in merged units."""
        return None if self.window_size is None else self.window_size // self.size_factor


@dataclass(frozen=True)
class TextArchitecture:
    """The language model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class QwenVLArchitecture:
    """Tower, language model and the ids that join them."""

    model_type: Literal["qwen2_vl", "qwen2_5_vl"]
    vision: VisionArchitecture
    text: TextArchitecture
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    @classmethod
    def from_huggingface(cls, config) -> QwenVLArchitecture:
        """Read a ``Qwen2VLConfig`` or ``Qwen2_5_VLConfig``.

        Raises:
            ValueError: for another model type, for rotary scaling that is not M-RoPE's default, for sliding windows
                in the language model, or for quantized weights, none of which this implementation computes.
        """
        if config.model_type not in ("qwen2_vl", "qwen2_5_vl"):
            raise ValueError(f"model_type is {config.model_type!r}: only qwen2_vl and qwen2_5_vl are implemented")
        quantized = getattr(config, "quantization_config", None)
        if quantized:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else None
            raise ValueError(
                f"config.json has a quantization_config (quant_method {method!r}): quantized weights are not "
                f"implemented. Use the model that they were made from; where the weights are whole, as after merging "
                f"adapters of a quantized model, remove that entry, which makes other libraries quantize them"
            )
        vision = _vision_2(config) if config.model_type == "qwen2_vl" else _vision_2_5(config)
        text = _text(config.text_config)
        if vision.out_hidden_size != text.hidden_size:
            raise ValueError(
                f"config.json: the tower emits {vision.out_hidden_size} features, the language model takes "
                f"{text.hidden_size}: use the file that came with the weights"
            )
        return cls(
            model_type=config.model_type,
            vision=vision,
            text=text,
            tie_word_embeddings=bool(config.tie_word_embeddings),
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            vision_start_token_id=config.vision_start_token_id,
            vision_end_token_id=config.vision_end_token_id,
        )


def _text(text) -> TextArchitecture:
    rope = dict(text.rope_parameters or {})
    if rope.get("rope_type", "default") not in ("default", "mrope"):
        raise ValueError(f"rope_type {rope['rope_type']!r} of the language model is not implemented: needs default")
    if text.use_sliding_window:
        raise ValueError("use_sliding_window is true: sliding-window layers are not implemented, set it to false")
    head_dim = text.hidden_size // text.num_attention_heads
    section = tuple(rope.get("mrope_section") or (16, 24, 24))
    if sum(section) * 2 != head_dim:
        raise ValueError(f"mrope_section {section} must sum to half of the head dimension {head_dim}")
    return TextArchitecture(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=float(rope.get("rope_theta", 1_000_000.0)),
        mrope_section=section,
        max_position_embeddings=text.max_position_embeddings,
    )


def _shared_vision(vision) -> dict:
    rope = dict(getattr(vision, "rope_parameters", None) or {})
    return dict(
        depth=vision.depth,
        num_heads=vision.num_heads,
        in_channels=vision.in_channels,
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        spatial_merge_size=vision.spatial_merge_size,
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
    )


def _vision_2_5(config) -> VisionArchitecture:
    vision = config.vision_config
    _check_activation(vision.hidden_act, "silu")
    return VisionArchitecture(
        **_shared_vision(vision),
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        out_hidden_size=vision.out_hidden_size,
        normalization="RMSNorm",
        activation="silu",
        gated=True,
        window_size=vision.window_size,
        fullatt_block_indexes=tuple(vision.fullatt_block_indexes),
        tokens_per_second=vision.tokens_per_second,
    )


def _vision_2(config) -> VisionArchitecture:
    vision = config.vision_config
    _check_activation(vision.hidden_act, "quick_gelu")
    return VisionArchitecture(
        **_shared_vision(vision),
        hidden_size=vision.embed_dim,
        intermediate_size=int(vision.embed_dim * vision.mlp_ratio),
        out_hidden_size=vision.hidden_size,
        normalization="LayerNorm",
        activation="quick_gelu",
        gated=False,
    )


def _check_activation(found: str, needed: str) -> None:
    if found != needed:
        raise ValueError(f"the tower's hidden_act is {found!r}, this family is implemented with {needed!r}")
