"""Patches become the picture they came from, checked against Hugging Face's image processor."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cocoa.evaluation.pictures import encode_png, patches_to_picture

GEOMETRY = {"patch_size": 7, "temporal_patch_size": 2, "spatial_merge_size": 2}


def test_patches_return_to_the_picture_that_the_processor_took():
    """Claim: exact inverse of Hugging Face's patching and normalisation for a picture that needs no resizing."""
    processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    pixels = np.random.default_rng(0).integers(0, 256, size=(28, 42, 3), dtype=np.uint8)
    processor = processing.Qwen2VLImageProcessorPil(
        patch_size=7, temporal_patch_size=2, merge_size=2, do_resize=False, do_rescale=True, do_normalize=True
    )
    batch = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
    picture = patches_to_picture(
        batch["pixel_values"],
        grid_thw=tuple(batch["image_grid_thw"][0].tolist()),
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        **GEOMETRY,
    )
    # Rounding to uint8 absorbs the float32 normalisation and its inverse.
    np.testing.assert_array_equal(picture, pixels)


def test_png_round_trip_is_lossless():
    """Claim: pictures reach the report as they are."""
    pixels = np.random.default_rng(1).integers(0, 256, size=(9, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_png(pixels)))), pixels)


def test_wild_predictions_are_clipped():
    """Claim: values far outside of the pixel range, or not finite, still give a picture."""
    patches = torch.full((4, 3 * 2 * 49), 1e4)
    patches[0] = float("nan")
    patches[1] = -1e4
    picture = patches_to_picture(
        patches, grid_thw=(1, 2, 2), image_mean=(0.5,) * 3, image_std=(0.5,) * 3, **GEOMETRY
    )
    assert picture.shape == (14, 14, 3) and set(np.unique(picture)) == {0, 255}


def test_wrong_shapes_are_refused():
    """Claim: patches that do not fit the grid are an error, not a scrambled picture."""
    with pytest.raises(ValueError, match=r"shape \(3, 294\) on grid \(1, 2, 2\): needed \(4, 294\)"):
        patches_to_picture(
            torch.zeros(3, 294), grid_thw=(1, 2, 2), image_mean=(0,) * 3, image_std=(1,) * 3, **GEOMETRY
        )
    with pytest.raises(ValueError, match="needed uint8"):
        encode_png(np.zeros((2, 2, 3)))
