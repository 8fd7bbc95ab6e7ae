"""Tiny random models and batches, run by Hugging Face's implementation: what every layout is compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from megatron_cocoa.batch import MaskKind, PackedBatch

IMAGE, VIDEO, VISION_START, VISION_END = 150, 151, 152, 153
TEXT_IDS = 150
"""Ids below this are text."""


def tiny_config(family: str, *, tied: bool = True, key_value_heads: int = 2, layers: int = 4):
    """A config of odd shapes: windows that do not divide pictures, a vocabulary that needs padding."""
    text = dict(
        vocab_size=157,
        hidden_size=64,
        intermediate_size=88,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=key_value_heads,
        rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0, mrope_section=[1, 1, 2]),
        max_position_embeddings=512,
        tie_word_embeddings=tied,
    )
    ids = dict(
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    if family == "qwen2_vl":
        vision = dict(depth=3, embed_dim=32, hidden_size=64, mlp_ratio=2, num_heads=4, patch_size=7)
        config = Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    else:
        vision = dict(
            depth=4,
            hidden_size=32,
            intermediate_size=44,
            num_heads=4,
            out_hidden_size=64,
            patch_size=7,
            window_size=42,
            fullatt_block_indexes=[1, 3],
            tokens_per_second=2,
        )
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    config._attn_implementation = "eager"
    return config


def tiny_huggingface(config, *, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A random model: weights large enough that every path matters, norms and biases away from their defaults."""
    torch.manual_seed(seed)
    cls = Qwen2VLForConditionalGeneration if config.model_type == "qwen2_vl" else Qwen2_5_VLForConditionalGeneration
    model = cls(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() == 1 else 1.5 * parameter[0].numel() ** -0.5
            parameter.normal_(0.0, scale)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.add_(1.0)
    return model.to(dtype).eval()


@dataclass(frozen=True)
class Sample:
    """One sequence before packing. ``items``: text lengths (int), and pictures or videos as ``(t, h, w)``."""

    items: tuple
    video_seconds: float | None = None
    """Seconds per temporal patch: marks every picture of the sample as a video."""


SAMPLES = {
    "text_only": [Sample((9,)), Sample((1,)), Sample((14,))],
    "one_image": [Sample((3, (1, 6, 10), 5))],
    "several_images": [Sample((2, (1, 4, 4), 3, (1, 10, 6), 4)), Sample(((1, 2, 2), 6))],
    "video": [Sample((2, (3, 4, 6), 5), video_seconds=1.5)],
    "mixed": [
        Sample((5,)),
        Sample(((1, 6, 8), 7)),
        Sample((11,)),
        Sample((2, (1, 4, 10), 1, (1, 2, 4), 6)),
        Sample((2, (2, 4, 4), 3), video_seconds=1.0),
    ],
}


@dataclass(frozen=True)
class Encoded:
    """A sample as Hugging Face takes it (batch of one)."""

    input_ids: torch.Tensor
    token_types: torch.Tensor
    grids: list[tuple[int, int, int]]
    pixels: torch.Tensor | None
    video_seconds: float | None


def encode(sample: Sample, config, generator: torch.Generator) -> Encoded:
    """Random ids and pixels for a sample's layout."""
    merge = config.vision_config.spatial_merge_size**2
    ids, types, grids = [], [], []
    placeholder, kind = (IMAGE, 1) if sample.video_seconds is None else (VIDEO, 2)
    for item in sample.items:
        if isinstance(item, int):
            ids.append(torch.randint(0, TEXT_IDS, (item,), generator=generator))
            types.append(torch.zeros(item, dtype=torch.long))
            continue
        units = item[0] * item[1] * item[2] // merge
        ids.append(torch.tensor([VISION_START] + [placeholder] * units + [VISION_END]))
        types.append(torch.tensor([0] + [kind] * units + [0]))
        grids.append(item)
    patch = config.vision_config.in_channels * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
    patches = sum(t * h * w for t, h, w in grids)
    pixels = torch.randn(patches, patch, generator=generator) if patches else None
    return Encoded(torch.cat(ids), torch.cat(types), grids, pixels, sample.video_seconds)


def run_huggingface(model, sample: Encoded, *, causal: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Final hidden states ``(tokens, hidden)``, logits ``(tokens, vocab)`` and positions ``(3, tokens)``."""
    model.config.text_config.is_causal = causal
    model.model.language_model.config.is_causal = causal
    grids = torch.tensor(sample.grids) if sample.grids else None
    is_video = sample.video_seconds is not None
    inputs = dict(input_ids=sample.input_ids[None])
    if grids is not None:
        inputs |= {f"pixel_values{'_videos' if is_video else ''}": sample.pixels.to(model.dtype)}
        inputs |= {f"{'video' if is_video else 'image'}_grid_thw": grids}
    positions = huggingface_positions(model, sample)
    out = model.model(**inputs, position_ids=positions[:, None], use_cache=False)
    hidden = out.last_hidden_state[0]
    return hidden, model.lm_head(hidden), positions


def huggingface_positions(model, sample: Encoded) -> torch.Tensor:
    """Hugging Face's own M-RoPE index, ``(3, tokens)``."""
    is_video = sample.video_seconds is not None
    grids = torch.tensor(sample.grids) if sample.grids else None
    arguments = {} if model.config.model_type == "qwen2_vl" or not is_video else dict(
        second_per_grid_ts=torch.tensor([sample.video_seconds] * len(sample.grids))
    )
    positions, _ = model.model.get_rope_index(
        sample.input_ids[None],
        mm_token_type_ids=sample.token_types[None],
        image_grid_thw=None if is_video else grids,
        video_grid_thw=grids if is_video else None,
        **arguments,
    )
    return positions[:, 0]


def pack(samples: list[Encoded], positions: list[torch.Tensor], kind: MaskKind, *, multiple: int = 1) -> PackedBatch:
    """The same samples as one packed micro-batch; every text row is supervised with a label of its own."""
    ids, types = torch.cat([s.input_ids for s in samples]), torch.cat([s.token_types for s in samples])
    tail = -len(ids) % multiple
    ids = torch.cat([ids, torch.zeros(tail, dtype=torch.long)])
    starts = torch.tensor([0] + [len(s.input_ids) for s in samples]).cumsum(0)
    pixels = [s.pixels for s in samples if s.pixels is not None]
    text = (types == 0).nonzero().squeeze(1)
    return PackedBatch(
        input_ids=ids,
        position_ids=torch.cat([*positions, torch.arange(tail).expand(3, tail)], dim=1),
        sample_lengths=tuple(len(s.input_ids) for s in samples),
        mask_kind=kind,
        bridge_positions=tuple(int(end) - 1 for end in starts[1:]),
        tail_length=tail,
        grid_thw=tuple(grid for s in samples for grid in s.grids),
        pixel_values=torch.cat(pixels) if pixels else None,
        feature_positions=(types > 0).nonzero().squeeze(1),
        text_positions=text,
        text_labels=(ids[text] * 7 + text) % TEXT_IDS,
        embedding_positions=starts[1:] - 1,
    )


def without_labels(batch: PackedBatch) -> PackedBatch:
    return replace(batch, text_positions=None, text_labels=None)
