"""Random inputs that a Hugging Face model and ours are compared on: text, one picture, several pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.batch import MaskKind, PackedBatch
from megatron_cocoa.data.positions import VisionSegment, mrope_positions

_LAYOUTS = ((17,), (4, (1, 6, 10), 9), (2, (1, 4, 4), 5, (1, 12, 6), 7))
"""Text tokens (int) and pictures (grids in merged units' double, scaled to the model's merge size) of each input."""


@dataclass(frozen=True)
class Probe:
    """One input.

    input_ids:   int64 ``(tokens,)``.
    token_types: int64 ``(tokens,)``, 1 at picture placeholders.
    positions:   int64 ``(3, tokens)``, from the project's own rule.
    grids:       of its pictures, in patches.
    pixels:      float32 ``(patches, patch_dim)``, None without pictures.
    """

    input_ids: Tensor
    token_types: Tensor
    positions: Tensor
    grids: tuple[tuple[int, int, int], ...]
    pixels: Tensor | None


def make_probes(architecture: QwenVLArchitecture) -> list[Probe]:
    """The inputs for a model; the same for the same architecture."""
    generator = torch.Generator().manual_seed(0)
    return [_make(layout, architecture, generator) for layout in _LAYOUTS]


def pack(probes: list[Probe], kind: MaskKind) -> PackedBatch:
    """All probes as one packed micro-batch without supervision."""
    lengths = tuple(len(probe.input_ids) for probe in probes)
    types = torch.cat([probe.token_types for probe in probes])
    ends = torch.tensor(lengths).cumsum(0) - 1
    return PackedBatch(
        input_ids=torch.cat([probe.input_ids for probe in probes]),
        position_ids=torch.cat([probe.positions for probe in probes], dim=1),
        sample_lengths=lengths,
        mask_kind=kind,
        bridge_positions=tuple(ends.tolist()),
        grid_thw=tuple(grid for probe in probes for grid in probe.grids),
        pixel_values=torch.cat([probe.pixels for probe in probes if probe.pixels is not None]),
        feature_positions=types.nonzero().squeeze(1),
        embedding_positions=ends,
    )


def _make(layout: tuple, architecture: QwenVLArchitecture, generator: torch.Generator) -> Probe:
    vision = architecture.vision
    ids, types, grids, segments = [], [], [], []
    for item in layout:
        if isinstance(item, int):
            ids.append(_text(item, architecture, generator))
            types.append(torch.zeros(item, dtype=torch.long))
            segments.append(item)
            continue
        grid = (item[0], *(side // 2 * vision.spatial_merge_size for side in item[1:]))
        units = vision.num_units(grid)
        marks = [architecture.vision_start_token_id, architecture.vision_end_token_id]
        ids.append(torch.tensor([marks[0], *[architecture.image_token_id] * units, marks[1]]))
        types.append(torch.tensor([0, *[1] * units, 0]))
        grids.append(grid)
        segments += [1, VisionSegment(grid), 1]
    patches = sum(t * h * w for t, h, w in grids)
    positions = mrope_positions(
        tuple(segments),
        spatial_merge_size=vision.spatial_merge_size,
        tokens_per_second=vision.tokens_per_second,
    )
    return Probe(
        input_ids=torch.cat(ids),
        token_types=torch.cat(types),
        positions=torch.from_numpy(positions.copy()),
        grids=tuple(grids),
        pixels=torch.randn(patches, vision.patch_dim, generator=generator) if patches else None,
    )


def _text(count: int, architecture: QwenVLArchitecture, generator: torch.Generator) -> Tensor:
    """Ids from the whole vocabulary but the vision tokens."""
    taken = torch.tensor([
        architecture.image_token_id, architecture.video_token_id,
        architecture.vision_start_token_id, architecture.vision_end_token_id,
    ])  # fmt: skip
    allowed = torch.ones(architecture.text.vocab_size, dtype=torch.bool)
    allowed[taken[taken < len(allowed)]] = False
    allowed = allowed.nonzero().squeeze(1)
    return allowed[torch.randint(0, len(allowed), (count,), generator=generator)]
