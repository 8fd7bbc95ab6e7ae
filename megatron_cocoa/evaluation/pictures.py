"""From the image processor's patches back to a picture, for reports.

The processor of Qwen2-VL flattens a picture into patches in the order of merged units; this is its inverse for a
single frame. Layout: ``transformers`` 5.x, ``models/qwen2_vl/image_processing_qwen2_vl.py``, ``_preprocess``.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

THUMBNAIL = 112
"""Pixels: more would make a page of many examples large."""


def patches_to_picture(
    patches: Tensor,
    *,
    grid_thw: tuple[int, int, int],
    patch_size: int,
    temporal_patch_size: int,
    spatial_merge_size: int,
    image_mean: Sequence[float],
    image_std: Sequence[float],
) -> np.ndarray:
    """Undo patching and normalisation of one still picture.

    Args:
        patches: float ``(h * w, channels * temporal_patch_size * patch_size**2)``, normalised, in the
            processor's order. The first of the repeated frames is taken.
        grid_thw: ``(1, h, w)`` in patches.
        patch_size, temporal_patch_size, spatial_merge_size: of the vision tower.
        image_mean, image_std: per channel, of the processor.

    Returns:
        uint8 ``(h * patch_size, w * patch_size, channels)``, clipped to [0, 255].

    Raises:
        ValueError: if the grid has several frames, or the patches do not fit it.
    """
    frames, height, width = grid_thw
    channels = len(image_mean)
    needed = height * width, channels * temporal_patch_size * patch_size**2
    if frames != 1 or tuple(patches.shape) != needed:
        raise ValueError(
            f"patches of shape {tuple(patches.shape)} on grid {grid_thw}: needed {needed} and a single frame"
        )
    merge = spatial_merge_size
    cells = patches.detach().float().cpu().numpy().reshape(
        height // merge, width // merge, merge, merge, channels, temporal_patch_size, patch_size, patch_size
    )
    still = cells[:, :, :, :, :, 0]
    rows = still.transpose(0, 2, 5, 1, 3, 6, 4).reshape(height * patch_size, width * patch_size, channels)
    scaled = (rows * np.asarray(image_std) + np.asarray(image_mean)) * 255
    return np.nan_to_num(scaled).round().clip(0, 255).astype(np.uint8)


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG file of uint8 pixels ``(height, width, 3)``.

    Raises:
        ValueError: for another shape or type.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels have shape {pixels.shape} and type {pixels.dtype}, needed uint8 (height, width, 3)")
    return picture_png(Image.fromarray(pixels))


def picture_png(image: Image.Image) -> bytes:
    """A PNG file of a picture in memory."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def thumbnail_png(image: Image.Image) -> bytes:
    """A PNG file of a picture, shrunk to ``THUMBNAIL`` pixels a side at most; ``image`` itself is shrunk."""
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return picture_png(image)
