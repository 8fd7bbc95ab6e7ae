"""Resized 8-bit pictures to the float rows that the tower reads.

Eight bytes of floats come from each byte of a picture (four a value, and every still is repeated in time), so what is
held, or crosses processes and ranks, is the picture; a cutter is small enough to go with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megatron_cocoa.architecture import VisionGeometry

_PIXELS_AT_ONCE = 2**15


@dataclass(frozen=True)
class PatchCutter:
    """Normalises and cuts, by a table lookup per pixel and one transpose for all pictures of a size.

    Args:
        vision: sizes of the tower.
        table: float32 ``(channels, 256)``: each level of each channel, normalised.
    """

    vision: VisionGeometry
    table: np.ndarray

    @classmethod
    def of_processor(cls, processor: Qwen2VLImageProcessorPil, vision: VisionGeometry) -> PatchCutter:
        """With the 256 results of the processor's own rescaling and normalising: equal by construction."""
        levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
        if processor.do_rescale:
            levels = processor.rescale(levels, processor.rescale_factor)
        if processor.do_normalize:
            levels = processor.normalize(levels, processor.image_mean, processor.image_std)
        return cls(vision, np.array(levels[:, 0], dtype=np.float32))

    def __call__(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Normalise and cut pictures, uint8 ``(3, height, width)`` each, sides multiples of ``vision.size_factor``.

        Returns:
            float32 ``(patches, patch_dim)``, the pictures one after the other, each in the processor's order: merged
            units row by row, the patches of a unit next to each other, and in a patch channel, time, row, column.
        """
        vision = self.vision
        counts = [picture.shape[1] * picture.shape[2] // vision.patch_size**2 for picture in pictures]
        ends = np.cumsum(counts, dtype=np.int64)
        out = np.empty((int(ends[-1]) if pictures else 0, vision.patch_dim), dtype=np.float32)
        start = 0
        while start < len(pictures):
            end = start + 1
            while end < len(pictures) and pictures[end].shape == pictures[start].shape:
                end += 1
            rows = slice(int(ends[start]) - counts[start], int(ends[end - 1]))
            self._cut(np.stack(pictures[start:end]), out[rows])
            start = end
        return out

    def _cut(self, pictures: np.ndarray, out: np.ndarray) -> None:
        """Pictures of one size, some pixels at a time: what is read and written in between stays in the cache."""
        vision = self.vision
        p, m, t = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        n, channels, height, width = pictures.shape
        rows, side = height // (p * m), p * m
        target = out.reshape(n, rows, -1, channels, t, p * p)
        at_once = max(1, _PIXELS_AT_ONCE // (height * width))
        rows_at_once = rows if at_once > 1 else max(1, _PIXELS_AT_ONCE // (side * width))
        for first in range(0, n, at_once):
            for row in range(0, rows, rows_at_once):
                part = pictures[first : first + at_once, :, row * side : (row + rows_at_once) * side]
                self._cut_part(part, target[first : first + at_once, row : row + rows_at_once])

    def _cut_part(self, pictures: np.ndarray, target: np.ndarray) -> None:
        vision = self.vision
        p, m = vision.patch_size, vision.spatial_merge_size
        n, channels, height, width = pictures.shape
        units_h, units_w = height // (p * m), width // (p * m)
        # Cutting the 8-bit pixels first moves a quarter of the bytes that cutting the normalised ones would.
        blocks = pictures.reshape(n, channels, units_h, m, p, units_w, m, p).transpose(1, 0, 2, 5, 3, 6, 4, 7)
        blocks = np.ascontiguousarray(blocks).reshape(channels, -1)
        pairs = _pair_table(self.table.tobytes()) if blocks.shape[1] % 2 == 0 else None
        for channel in range(channels):
            if pairs is None:
                values = self.table[channel][blocks[channel]]
            else:
                values = pairs[channel].take(blocks[channel].view(np.uint16)).view(np.float32)
            target[:, :, :, channel] = values.reshape(*target.shape[:3], 1, -1)


@lru_cache(maxsize=8)
def _pair_table(table: bytes) -> np.ndarray:
    """``PatchCutter.table`` for two neighbouring pixels at a time, which halves the look-ups.

    Returns:
        float64 ``(channels, 65536)``, in truth two float32 each: an item is copied as it is, never computed with.
    """
    levels = np.frombuffer(table, dtype=np.float32).reshape(-1, 256)
    both = np.arange(2**16, dtype=np.uint16).view(np.uint8)
    return np.ascontiguousarray(levels[:, both]).view(np.float64)
