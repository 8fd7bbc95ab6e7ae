"""Where each patch of a batch of pictures goes: window order, rotary positions, segments. All on the host.

Everything follows from the grids alone, so it is computed once for a grid and kept. Sources: Hugging Face
transformers' ``vision_utils.py`` (5.x), which the order of patches and windows must match.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_cocoa.architecture import VisionArchitecture
from megatron_cocoa.model.segments import SegmentTable

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class VisionLayout:
    """Layout of the patches of one micro-batch.

    patch_order: int64 ``(patches,)``: row of ``pixel_values`` that comes at each place in window order.
    unit_order:  int64 ``(merged_units,)``: merged unit (in the batch's order) at each place in window order.
    positions:   int64 ``(patches, 2)``: height and width of each patch in its picture, in window order.
    windows:     segments of windowed blocks; equal to ``frames`` for a tower without windows.
    frames:      segments of full-attention blocks: one per frame.
    """

    patch_order: np.ndarray
    unit_order: np.ndarray
    positions: np.ndarray
    windows: SegmentTable
    frames: SegmentTable

    @property
    def is_reordered(self) -> bool:
        return self.windows is not self.frames


def build_layout(grids: Sequence[Grid], vision: VisionArchitecture) -> VisionLayout:
    """Layout of pictures and videos with these ``(t, h, w)`` grids in patches, in batch order."""
    parts = [_grid_layout(grid, vision.spatial_merge_size, vision.window_units) for grid in grids]
    unit_counts = np.array([len(part[0]) for part in parts])
    starts = np.concatenate([[0], np.cumsum(unit_counts)[:-1]])
    unit_order = np.concatenate([part[0] + start for part, start in zip(parts, starts)])
    merge = vision.patches_per_unit
    frames = SegmentTable.from_lengths(np.repeat([h * w for _, h, w in grids], [t for t, _, _ in grids]))
    windows = frames
    if vision.window_units is not None:
        windows = SegmentTable.from_lengths(np.concatenate([part[1] for part in parts]) * merge)
    return VisionLayout(
        patch_order=(unit_order[:, None] * merge + np.arange(merge)).ravel(),
        unit_order=unit_order,
        positions=np.concatenate([part[2] for part in parts]),
        windows=windows,
        frames=frames,
    )


@functools.lru_cache(maxsize=4096)
def _grid_layout(grid: Grid, merge: int, window: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one picture: merged units in window order, units per window, and patch positions in window order."""
    t, h, w = grid
    rows, columns = h // merge, w // merge
    units = np.arange(t * rows * columns).reshape(t, rows, columns)
    counts = np.array([rows * columns] * t)
    if window is not None:
        window_of = (np.arange(rows)[:, None] // window) * -(-columns // window) + np.arange(columns)[None, :] // window
        within_frame = np.argsort(window_of.ravel(), kind="stable")
        units = units.reshape(t, -1)[:, within_frame]
        counts = np.tile(np.bincount(window_of.ravel()), t)
    patch_h, patch_w = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    # Patches come merged-unit by merged-unit: (h / m, m, w / m, m) -> (h / m, w / m, m, m).
    by_unit = [
        np.tile(x.reshape(rows, merge, columns, merge).transpose(0, 2, 1, 3).reshape(-1, merge * merge), (t, 1))
        for x in (patch_h, patch_w)
    ]
    order = units.ravel()
    return order, counts, np.stack([x[order].ravel() for x in by_unit], axis=1)
