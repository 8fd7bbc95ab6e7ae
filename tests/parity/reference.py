"""Tiny random models and batches, run by Hugging Face's implementation: what every layout is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from megatron_cocoa.batch import MaskKind, PackedBatch
from tests.parity.masks import dense_mask

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
    randomize(model)
    return cast_parameters(model, dtype).eval()


def cast_parameters(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """``module.to(dtype)`` without its buffers: rotary frequencies stay FP32, as in a model loaded in ``dtype``."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


@torch.no_grad()
def randomize(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        scale = 0.3 if parameter.dim() == 1 else 1.5 * parameter[0].numel() ** -0.5
        parameter.normal_(0.0, scale)
        if parameter.dim() == 1 and name.endswith("weight"):
            parameter.add_(1.0)


@dataclass(frozen=True)
class Sample:
    """One sequence before packing. ``items``: text lengths (int), and pictures or videos as ``(t, h, w)``."""

    items: tuple
    video_seconds: float | None = None
    """Seconds per temporal patch: marks every picture of the sample as a video."""


_TEXT, _PICTURE = Sample((7,)), Sample((2, (1, 4, 6), 3))

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
    "alternating": [_TEXT, _PICTURE, Sample((4,)), Sample(((1, 4, 4), (1, 2, 2), 2))],
    "halves": [_TEXT, Sample((4,)), _PICTURE, Sample(((1, 4, 4), (1, 2, 2), 2))],
}
"""``alternating`` and ``halves`` lay out which micro-batch or data-parallel rank has pictures, see ``make_batches``."""


@dataclass(frozen=True)
class Encoded:
    """A sample as Hugging Face takes it (batch of one).

    bridge: row of the bridge, chosen so that over a pack block A or block B is empty for some sample.
    unit_rows, unit_targets: every other placeholder row, and pixels that the image decoder should predict there.
    """

    input_ids: torch.Tensor
    token_types: torch.Tensor
    grids: list[tuple[int, int, int]]
    pixels: torch.Tensor | None
    video_seconds: float | None
    bridge: int
    unit_rows: torch.Tensor
    unit_targets: torch.Tensor

    @property
    def text_rows(self) -> torch.Tensor:
        return (self.token_types == 0).nonzero().squeeze(1)

    @property
    def labels(self) -> torch.Tensor:
        """One label for every text row, a function of the sample alone."""
        return (self.input_ids[self.text_rows] * 7 + self.text_rows) % TEXT_IDS


def encode(sample: Sample, config, generator: torch.Generator, *, index: int = 0, kind: MaskKind) -> Encoded:
    """Random ids and pixels for the layout of the ``index``-th sample of a pack."""
    merge = config.vision_config.spatial_merge_size**2
    ids, types, grids = [], [], []
    placeholder, number = (IMAGE, 1) if sample.video_seconds is None else (VIDEO, 2)
    for item in sample.items:
        if isinstance(item, int):
            ids.append(torch.randint(0, TEXT_IDS, (item,), generator=generator))
            types.append(torch.zeros(item, dtype=torch.long))
            continue
        units = item[0] * item[1] * item[2] // merge
        ids.append(torch.tensor([VISION_START] + [placeholder] * units + [VISION_END]))
        types.append(torch.tensor([0] + [number] * units + [0]))
        grids.append(item)
    vision = config.vision_config
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    patches = sum(t * h * w for t, h, w in grids)
    types, length = torch.cat(types), sum(len(x) for x in ids)
    unit_rows = (types > 0).nonzero().squeeze(1)[::2]
    return Encoded(
        input_ids=torch.cat(ids),
        token_types=types,
        grids=grids,
        pixels=torch.randn(patches, patch, generator=generator) if patches else None,
        video_seconds=sample.video_seconds,
        bridge=(length // 2, length - 1, 0, length * 2 // 3)[index % 4] if kind.needs_bridge else length - 1,
        unit_rows=unit_rows,
        unit_targets=torch.randn(len(unit_rows), merge * patch, generator=generator),
    )


def run_huggingface(model, sample: Encoded, *, kind: MaskKind) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states ``(tokens, hidden)`` and positions ``(3, tokens)``.

    Causal and bidirectional masks are Hugging Face's own; the bridged ones are dense masks from the definition.
    """
    causal = kind is MaskKind.CAUSAL
    model.config.text_config.is_causal = causal
    model.model.language_model.config.is_causal = causal
    inputs = dict(input_ids=sample.input_ids[None])
    if sample.grids:
        name = "image" if sample.video_seconds is None else "video"
        inputs["pixel_values" if name == "image" else "pixel_values_videos"] = sample.pixels.to(model.dtype)
        inputs[f"{name}_grid_thw"] = torch.tensor(sample.grids)
    if kind.needs_bridge:
        visible = dense_mask(kind, [len(sample.input_ids)], [sample.bridge])
        forbidden = torch.zeros(visible.shape, dtype=model.dtype).masked_fill(~visible, torch.finfo(model.dtype).min)
        inputs["attention_mask"] = {"full_attention": forbidden[None, None]}
    positions = huggingface_positions(model, sample)
    out = model.model(**inputs, position_ids=positions[:, None], use_cache=False)
    return out.last_hidden_state[0], positions


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


class ImageDecoderReference(torch.nn.Module):
    """The image decoder from Hugging Face's own decoder layers and a torch linear, with dense attention."""

    def __init__(self, model, *, layers: int = 1, seed: int = 3):
        super().__init__()
        text, vision = model.config.text_config, model.config.vision_config
        # The rotary module has no weights; as a list entry it is not registered a second time.
        self.rotary = [model.model.language_model.rotary_emb]
        torch.manual_seed(seed)
        kind = type(model.model.language_model.layers[0])
        self.layers = torch.nn.ModuleList(kind(text, index) for index in range(layers))
        unit = vision.spatial_merge_size**2 * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        self.pixel_head = torch.nn.Linear(text.hidden_size, unit)
        randomize(self)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Pixels ``(units, unit_dim)`` at ``rows`` of one sample's final hidden states ``(tokens, hidden)``."""
        rotary = self.rotary[0](hidden[None], positions[:, None])
        hidden = hidden[None]
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        return self.pixel_head(hidden[0, rows])


def pack(
    samples: list[Encoded],
    positions: list[torch.Tensor],
    kind: MaskKind,
    *,
    multiple: int = 1,
    with_units: bool = False,
) -> PackedBatch:
    """The same samples as one packed micro-batch; every text row is supervised with a label of its own."""
    ids = torch.cat([s.input_ids for s in samples])
    tail = -len(ids) % multiple
    starts = torch.tensor([0] + [len(s.input_ids) for s in samples]).cumsum(0)[:-1]
    pixels = [s.pixels for s in samples if s.pixels is not None]

    def rows(local: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([start + row for start, row in zip(starts, local)])

    bridges = [int(start) + s.bridge for start, s in zip(starts, samples)]
    return PackedBatch(
        input_ids=torch.cat([ids, torch.zeros(tail, dtype=torch.long)]),
        position_ids=torch.cat([*positions, torch.arange(tail).expand(3, tail)], dim=1),
        sample_lengths=tuple(len(s.input_ids) for s in samples),
        mask_kind=kind,
        bridge_positions=tuple(bridges),
        tail_length=tail,
        grid_thw=tuple(grid for s in samples for grid in s.grids),
        pixel_values=torch.cat(pixels) if pixels else None,
        feature_positions=rows([(s.token_types > 0).nonzero().squeeze(1) for s in samples]),
        text_positions=rows([s.text_rows for s in samples]),
        text_labels=torch.cat([s.labels for s in samples]),
        unit_positions=rows([s.unit_rows for s in samples]) if with_units else None,
        unit_targets=torch.cat([s.unit_targets for s in samples]) if with_units else None,
        embedding_positions=torch.tensor(bridges),
    )
