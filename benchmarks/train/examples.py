"""The samples of one step, before either side packs or pads them: token ids, pixels, labels, all drawn from a seed.

How long captions are and how large pictures, which decides how much padding wastes, is committed data
(``lengths.json``, where it is described). Everything else is random: ids and pixels do not change the work.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_cocoa.data.positions import VisionSegment, mrope_positions

LENGTHS_FILE = Path(__file__).with_name("lengths.json")
DISTRIBUTIONS = ("short", "long")
IMAGE_SIZES = {"warmup": 336, "bridge": 448, "contrastive": None}
"""Side of the square pictures of each stage in pixels, as published; None takes each picture's own size."""
MASKED_TEXT = {"warmup": 0.2, "bridge": 0.7}
MASKED_UNITS = 0.5
QUERY_TOKENS = 12
"""Of a query's instruction, in stages ``bridge`` and ``contrastive``."""
CONTROL_TOKENS = 5
"""At the end of the vocabulary: vision start, vision end, image pad, bridge, and one that no example holds."""


@dataclass(frozen=True)
class Example:
    """One sequence with at most one picture.

    ids:          int64 ``(tokens,)``, masked.
    positions:    int64 ``(3, tokens)``.
    grid:         ``(t, h, w)`` in patches, or None.
    pixels:       float32 ``(patches, patch_dim)`` with noise over masked units.
    feature_rows: int64 ``(units,)``: rows of the placeholders.
    bridge:       row of the bridge, or None.
    text_rows, text_labels: which rows predict, and what.
    unit_rows, unit_targets: rows of masked units, and their pixels ``(units, unit_dim)``.
    """

    ids: Tensor
    positions: Tensor
    grid: tuple[int, int, int] | None = None
    pixels: Tensor | None = None
    feature_rows: Tensor | None = None
    bridge: int | None = None
    text_rows: Tensor | None = None
    text_labels: Tensor | None = None
    unit_rows: Tensor | None = None
    unit_targets: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.ids.shape[0]


class ExampleMaker:
    """Draws the examples of a stage for a Hugging Face config of the family.

    Args:
        config: gives vocabulary, patch and merge sizes.
        distribution: of ``DISTRIBUTIONS``.
        image_size: overrides the stage's published one.
        seed: of ids, pixels and masks. Lengths follow ``lengths.json`` in its order.
    """

    def __init__(self, config, distribution: str, *, image_size: int | None = None, seed: int = 0) -> None:
        lengths = json.loads(LENGTHS_FILE.read_text(encoding="utf-8"))
        self._captions, self._pictures = lengths["caption_tokens"][distribution], lengths["picture_sides"]
        self._vision, self._image_size = config.vision_config, image_size
        words = config.text_config.vocab_size - CONTROL_TOKENS
        self._num_words = words
        self._start, self._end, self._pad, self._bridge_id, _ = range(words, words + CONTROL_TOKENS)
        self._generator = torch.Generator().manual_seed(seed)

    def step(self, stage: str, count: int) -> list[Example]:
        """``count`` samples of a reconstruction stage, or ``count`` pairs as query, target, query, target."""
        if stage == "contrastive":
            return [example for index in range(count) for example in self._pair(index)]
        return [getattr(self, f"_{stage}")(index) for index in range(count)]

    def _caption(self, index: int) -> Tensor:
        length = self._captions[index % len(self._captions)]
        return torch.randint(0, self._num_words, (length,), generator=self._generator)

    def _instruction(self) -> Tensor:
        return torch.randint(0, self._num_words, (QUERY_TOKENS,), generator=self._generator)

    def _grid(self, index: int, stage: str) -> tuple[int, int, int]:
        side = self._image_size or IMAGE_SIZES[stage]
        height, width = (side, side) if side else self._pictures[index % len(self._pictures)]
        unit = self._vision.patch_size * self._vision.spatial_merge_size
        merge = self._vision.spatial_merge_size
        return 1, max(1, round(height / unit)) * merge, max(1, round(width / unit)) * merge

    def _lay_out(self, index: int, stage: str, *texts: Tensor) -> Example:
        """Picture, then texts."""
        grid = self._grid(index, stage)
        units = grid[1] * grid[2] // self._vision.spatial_merge_size**2
        head = torch.tensor([self._start] + [self._pad] * units + [self._end])
        ids = torch.cat([head, *texts])
        patch_dim = self._vision.in_channels * self._vision.temporal_patch_size * self._vision.patch_size**2
        return Example(
            ids=ids,
            positions=self._positions((1, VisionSegment(grid), len(ids) - units - 1)),
            grid=grid,
            pixels=torch.randn(grid[1] * grid[2], patch_dim, generator=self._generator),
            feature_rows=torch.arange(1, units + 1),
        )

    def _positions(self, segments: tuple) -> Tensor:
        merge = self._vision.spatial_merge_size
        return torch.from_numpy(mrope_positions(segments, spatial_merge_size=merge).copy())

    def _draw(self, count: int, ratio: float) -> Tensor:
        """Sorted, at least one."""
        number = max(1, round(count * ratio))
        return torch.randperm(count, generator=self._generator)[:number].sort().values

    def _mask_text(self, example: Example, first: int, ratio: float) -> Example:
        """Hide ``ratio`` of the tokens from row ``first`` on behind the vocabulary's first word."""
        rows = first + self._draw(example.num_tokens - first, ratio)
        ids = example.ids.clone()
        ids[rows] = 0
        return replace(example, ids=ids, text_rows=rows - 1, text_labels=example.ids[rows])

    def _warmup(self, index: int) -> Example:
        example = self._lay_out(index, "warmup", self._caption(index))
        example = self._mask_text(example, len(example.feature_rows) + 2, MASKED_TEXT["warmup"])
        masked = self._draw(len(example.feature_rows), MASKED_UNITS)
        units = example.pixels.view(len(example.feature_rows), -1)
        targets = units[masked].clone()
        units[masked] = torch.randn(targets.shape, generator=self._generator)
        return replace(example, unit_rows=example.feature_rows[masked], unit_targets=targets)

    def _bridge(self, index: int) -> Example:
        """Block A is picture and instruction, block B the caption."""
        bridge = torch.tensor([self._bridge_id])
        example = self._lay_out(index, "bridge", self._instruction(), bridge, self._caption(index))
        row = len(example.feature_rows) + 2 + QUERY_TOKENS
        return replace(self._mask_text(example, row + 1, MASKED_TEXT["bridge"]), bridge=row)

    def _pair(self, index: int) -> tuple[Example, Example]:
        bridge = torch.tensor([self._bridge_id])
        query = self._lay_out(index, "contrastive", self._instruction(), bridge)
        ids = torch.cat([self._caption(index), bridge])
        target = Example(ids=ids, positions=self._positions((len(ids),)), bridge=len(ids) - 1)
        return replace(query, bridge=query.num_tokens - 1), target
