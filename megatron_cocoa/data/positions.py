"""M-RoPE index of one sample: three position axes (time, height, width) that text and pictures share.

A sample is described by its segments instead of its token ids, so that nothing has to search for placeholders
and the common layouts (same picture size, similar text length) come out of a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class VisionSegment:
    """The placeholder tokens of one picture or video inside a sample.

    Args:
        grid_thw: ``(t, h, w)`` in patches, before merging.
        seconds_per_grid: seconds between two temporal patches of a video; None for a picture.
    """

    grid_thw: tuple[int, int, int]
    seconds_per_grid: float | None = None


Segment = int | VisionSegment
"""A run of that many text tokens (markers and bridge included), or the placeholders of one picture or video."""


@lru_cache(maxsize=4096)
def mrope_positions(
    segments: tuple[Segment, ...], *, spatial_merge_size: int, tokens_per_second: float | None = None
) -> np.ndarray:
    """Position index of one sample, equal to ``get_rope_index`` of Qwen2VLModel and Qwen2_5_VLModel.

    The published 2-D and video rule (transformers 5.23, ``modeling_qwen2_vl.py`` and ``modeling_qwen2_5_vl.py``):
    text counts one step a token on all three axes; a picture lies on its own grid, offset by the current
    position, and moves that position on by the longer side of its merged grid; video frames are
    ``tokens_per_second * seconds_per_grid`` steps apart where ``tokens_per_second`` is given, else one.

    Returns:
        int64 ``(3, tokens)``, read-only (it is cached), starting at 0: positions restart at each packed sample.

    Raises:
        ValueError: if ``spatial_merge_size`` does not divide a grid.
    """
    parts: list[np.ndarray] = []
    position = 0
    for segment in segments:
        if isinstance(segment, VisionSegment):
            part, step = _vision_positions(segment, spatial_merge_size, tokens_per_second)
            parts.append(part + position)
        else:
            step = segment
            parts.append(np.broadcast_to(np.arange(position, position + step, dtype=np.int64), (3, step)))
        position += step
    positions = np.concatenate(parts, axis=1) if parts else np.zeros((3, 0), dtype=np.int64)
    positions.setflags(write=False)
    return positions


def _vision_positions(
    segment: VisionSegment, spatial_merge_size: int, tokens_per_second: float | None
) -> tuple[np.ndarray, int]:
    t, h, w = segment.grid_thw
    if t < 1 or h < 1 or w < 1 or h % spatial_merge_size or w % spatial_merge_size:
        raise ValueError(
            f"grid {segment.grid_thw} has a side that spatial_merge_size {spatial_merge_size} does not divide"
        )
    interval = 1.0
    if segment.seconds_per_grid is not None and tokens_per_second is not None:
        interval = tokens_per_second * segment.seconds_per_grid
    height, width = h // spatial_merge_size, w // spatial_merge_size
    # Hugging Face multiplies in float32 before it truncates: where that gives 62.999996, float64 would give 63.
    times = (np.arange(t, dtype=np.float32) * np.float32(interval)).astype(np.int64)
    grid = np.empty((3, t, height, width), dtype=np.int64)
    grid[0] = times[:, None, None]
    grid[1] = np.arange(height)[None, :, None]
    grid[2] = np.arange(width)[None, None, :]
    return grid.reshape(3, -1), max(height, width)
