"""The floats of a pack before they are made: 8-bit pictures, and which of their units are hidden by what.

An eighth of the bytes of the pixels, in one tensor, and the seeds of the noise over them, so that a pack crosses from a
worker process, and from the reading rank of a replica to the others, in this form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_cocoa.data.corruption import UnitNoise, normalize_targets, replace_units
from megatron_cocoa.data.patches import PatchCutter


@dataclass(frozen=True, eq=False)
class DeferredFloats:
    """Makes ``pixel_values`` and ``unit_targets`` of a pack when it is called; stands as ``PackedBatch.deferred``.

    Args:
        cutter: normalises and cuts.
        grid_thw: patches of each picture.
        pictures: uint8 ``(bytes,)``: all pictures, one after the other, each ``(3, height, width)``; None where this
            rank needs nothing of them.
        masked: int64 ``(masked_units,)``: which units of the pack are hidden.
        masked_patches: int64 ``(masked_patches,)``: which patches of the pack are hidden, where not whole units are;
            those of ``masked``. None where units are hidden.
        noise: of each sample that has hidden units, in order: what hides them, all of one kind.
        is_supervised: the hidden units are to be predicted: ``unit_targets`` is one of the fields.
        needs_pixels, needs_unit_targets, normalize_unit_targets: as in ``PackOptions``.
    """

    cutter: PatchCutter
    grid_thw: tuple[tuple[int, int, int], ...]
    pictures: Tensor | None
    masked: np.ndarray
    noise: tuple[UnitNoise, ...]
    is_supervised: bool
    needs_pixels: bool = True
    needs_unit_targets: bool = True
    normalize_unit_targets: bool = False
    masked_patches: np.ndarray | None = None

    @property
    def makes_targets(self) -> bool:
        """Whether ``unit_targets`` hold pixels."""
        return self.is_supervised and self.needs_unit_targets

    @property
    def picture_bytes(self) -> int:
        """Of ``pictures``, by the grids alone."""
        vision = self.cutter.vision
        return sum(h * w for _, h, w in self.grid_thw) * vision.in_channels * vision.patch_size**2

    def __call__(self) -> dict[str, Tensor]:
        """Pixels with noise over the hidden units, and what those units showed, each as far as it is needed."""
        vision = self.cutter.vision
        targets = np.zeros((self.masked.size, vision.unit_dim if self.makes_targets else 0), dtype=np.float32)
        fields: dict[str, Tensor] = {}
        if self.grid_thw and (self.needs_pixels or self.makes_targets):
            pixels = self.cutter(self._cut_apart())
            if self.makes_targets:
                targets = pixels.reshape(-1, vision.unit_dim)[self.masked]
                targets = normalize_targets(targets, vision=vision) if self.normalize_unit_targets else targets
            if self.needs_pixels:
                by_patch = self.masked_patches is not None
                hidden = self.masked_patches if by_patch else self.masked
                replace_units(pixels, hidden, self._drawn(), vision=vision, by_patch=by_patch)
                fields["pixel_values"] = torch.from_numpy(pixels)
        if self.is_supervised:
            fields["unit_targets"] = torch.from_numpy(targets)
        return fields

    def _drawn(self) -> np.ndarray | None:
        """float32 ``(masked_units, unit_dim)`` or ``(masked_patches, patch_dim)``; None for each one's own mean."""
        vision = self.cutter.vision
        width = vision.unit_dim if self.masked_patches is None else vision.patch_dim
        drawn = [noise.draw(width, patch_dim=vision.patch_dim) for noise in self.noise]
        return None if not drawn or drawn[0] is None else np.concatenate(drawn)

    def _cut_apart(self) -> list[np.ndarray]:
        side, channels = self.cutter.vision.patch_size, self.cutter.vision.in_channels
        shapes = [(channels, h * side, w * side) for _, h, w in self.grid_thw]
        ends = np.cumsum([np.prod(shape) for shape in shapes])[:-1]
        return [part.reshape(shape) for part, shape in zip(np.split(self.pictures.numpy(), ends), shapes)]


def joined(pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures, uint8 ``(3, height, width)`` each, as ``DeferredFloats.pictures``: a copy."""
    parts = [picture.reshape(-1) for picture in pictures]
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8))
