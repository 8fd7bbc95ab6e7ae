"""Every kind of picture file gives the patches of transformers' own loading and Qwen's own processor."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megatron_cocoa.architecture import VisionGeometry
from megatron_cocoa.data.decode import PictureError, picture_size
from megatron_cocoa.data.preprocess import PictureLoader

VISION = VisionGeometry(patch_size=14, temporal_patch_size=2, spatial_merge_size=2)
LIMITS = {"min_pixels": 56 * 56, "max_pixels": 200 * 200}


def _noise(mode: str, size=(70, 51)) -> Image.Image:
    rng = np.random.default_rng(3)
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    pixels = rng.integers(0, 256, size=(size[1], size[0], channels), dtype=np.uint8)
    return (
        Image.fromarray(pixels.squeeze(), mode=None)
        if channels == 1
        else Image.merge(mode, [Image.fromarray(pixels[..., c]) for c in range(channels)])
    )


def _palette(**options) -> tuple[Image.Image, dict]:
    return _noise("RGB").quantize(16), options


KINDS = {
    "rgb.png": (_noise("RGB"), {}),
    "rgb.jpg": (_noise("RGB"), {}),
    "rgb.webp": (_noise("RGB"), {}),
    "rgba.png": (_noise("RGBA"), {}),
    "rgba.webp": (_noise("RGBA"), {"lossless": True}),
    "grey.png": (_noise("L"), {}),
    "grey.jpg": (_noise("L"), {}),
    "grey-alpha.png": (_noise("LA"), {}),
    "palette.png": _palette(),
    "palette-transparent.png": _palette(transparency=3),
    "grey-transparent.png": (_noise("L"), {"transparency": 7}),
    "palette.gif": _palette(),
    "bits.png": (_noise("L").convert("1"), {}),
    "cmyk.jpg": (_noise("CMYK"), {}),
    "cmyk.tiff": (_noise("CMYK"), {}),
    "animated.gif": (_noise("L"), {"save_all": True, "append_images": [Image.new("L", (70, 51), 9)]}),
    "animated.webp": (_noise("RGB"), {"save_all": True, "append_images": [Image.new("RGB", (70, 51))]}),
    "wrong-name.png": (_noise("RGB"), {"format": "JPEG"}),
    "bitmap.bmp": (_noise("RGB"), {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_each_kind_equals_the_processor(tmp_path, name):
    """Claim: whatever the file holds, the model sees what Hugging Face's loading and processor would show it."""
    image, options = KINDS[name]
    image.save(tmp_path / name, **options)
    processor = Qwen2VLImageProcessorPil(**LIMITS)
    loader = PictureLoader(tmp_path, processor=processor, vision=VISION)
    with Image.open(tmp_path / name) as opened:
        expected = processor(ImageOps.exif_transpose(opened), return_tensors="np")
    picture = loader.load(name)
    assert loader.grid(picture) == tuple(expected["image_grid_thw"][0]) == loader.planned_grid(name)
    np.testing.assert_array_equal(loader.patches([picture]), expected["pixel_values"])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_equals_the_processor(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    _noise("RGB", (90, 40)).save(tmp_path / "a.jpg", exif=exif)
    processor = Qwen2VLImageProcessorPil(**LIMITS)
    loader = PictureLoader(tmp_path, processor=processor, vision=VISION)
    with Image.open(tmp_path / "a.jpg") as opened:
        expected = processor(ImageOps.exif_transpose(opened), return_tensors="np")
    picture = loader.load("a.jpg")
    np.testing.assert_array_equal(loader.patches([picture]), expected["pixel_values"])
    # The plan may have the sides exchanged, never another number of tokens.
    assert np.prod(loader.planned_grid("a.jpg")) == np.prod(loader.grid(picture))


@pytest.mark.parametrize("limits", [(4, 16), (1, 4), (64, 256)])
@pytest.mark.parametrize("size", [(300, 200), (20, 20), (1, 1), (200, 1)])
def test_limits_in_tokens_are_the_processors_in_pixels(tmp_path, limits, size):
    """Claim: ``min_image_tokens`` and ``max_image_tokens`` are Qwen's pixel limits, in units of a merged token."""
    low, high = limits
    _noise("RGB", size).save(tmp_path / "a.png")
    loader = PictureLoader(
        tmp_path, processor=Qwen2VLImageProcessorPil(), vision=VISION, min_image_tokens=low, max_image_tokens=high
    )
    reference = Qwen2VLImageProcessorPil(min_pixels=low * 28 * 28, max_pixels=high * 28 * 28)
    expected = reference(Image.open(tmp_path / "a.png"), return_tensors="np")
    picture = loader.load("a.png")
    assert loader.grid(picture) == tuple(expected["image_grid_thw"][0])
    np.testing.assert_array_equal(loader.patches([picture]), expected["pixel_values"])


@pytest.mark.parametrize("side", [336, 448, 672])
def test_published_squares(tmp_path, side):
    """Claim: a square is plain bicubic resizing, and holds (side / 28)^2 tokens."""
    image = _noise("RGB", (200, 80))
    image.save(tmp_path / "a.png")
    loader = PictureLoader(tmp_path, processor=Qwen2VLImageProcessorPil(), vision=VISION, image_size=side)
    picture = loader.load("a.png")
    expected = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    np.testing.assert_array_equal(picture, expected)
    assert VISION.num_units(loader.grid(picture)) == (side // 28) ** 2
    assert loader.planned_grid("a.png") == loader.grid(picture)


def test_limits_out_of_order_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 39200 and at most 3920 pixels .784 make one image token"):
        PictureLoader(
            tmp_path, processor=Qwen2VLImageProcessorPil(), vision=VISION, min_image_tokens=50, max_image_tokens=5
        )


def test_postscript_is_never_opened(tmp_path):
    """Claim: Pillow's PostScript decoder, which runs Ghostscript, is out of reach whatever the file is called."""
    _noise("RGB").save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(PictureError, match="cannot be decoded"):
        picture_size(tmp_path / "a.png")
