"""Pictures become the same patches as with transformers' processor, and what cannot be used is refused by name."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megatron_cocoa.architecture import VisionGeometry
from megatron_cocoa.data import decode
from megatron_cocoa.data.decode import PictureError, read_picture
from megatron_cocoa.data.preprocess import PictureLoader, load_processor

RNG = np.random.default_rng(0)


def noise_picture(width, height):
    return Image.fromarray(RNG.integers(0, 256, size=(height, width, 3), dtype=np.uint8))


def loader_for(root, *, patch_size=14, image_size=None, **kwargs):
    processor = Qwen2VLImageProcessorPil(patch_size=patch_size, min_pixels=56 * 56, max_pixels=200 * 200)
    vision = VisionGeometry(patch_size=patch_size, temporal_patch_size=2, spatial_merge_size=2)
    return PictureLoader(root, processor=processor, vision=vision, image_size=image_size, **kwargs), processor


@pytest.mark.parametrize("patch_size", [7, 14])
@pytest.mark.parametrize("size", [(72, 72), (30, 90), (301, 187), (500, 40)])
def test_native_size_equals_the_processor_bit_for_bit(tmp_path, patch_size, size):
    image = noise_picture(*size)
    image.save(tmp_path / "a.png")
    loader, processor = loader_for(tmp_path, patch_size=patch_size)
    expected = processor(image, return_tensors="np")
    picture = loader.load("a.png")
    assert loader.grid(picture) == tuple(expected["image_grid_thw"][0])
    np.testing.assert_array_equal(loader.patches([picture]), expected["pixel_values"])


def test_square_size_equals_the_processor_on_the_resized_picture(tmp_path):
    image = noise_picture(95, 61)
    image.save(tmp_path / "a.png")
    loader, processor = loader_for(tmp_path, image_size=84)
    squashed = image.resize((84, 84), Image.Resampling.BICUBIC)
    expected = processor(squashed, return_tensors="np", do_resize=False)["pixel_values"]
    np.testing.assert_array_equal(loader.patches([loader.load("a.png")]), expected)


def test_mixed_sizes_keep_their_order(tmp_path):
    for name, size in (("a", (72, 72)), ("b", (72, 72)), ("c", (150, 60)), ("d", (72, 72))):
        noise_picture(*size).save(tmp_path / f"{name}.png")
    loader, _ = loader_for(tmp_path)
    pictures = [loader.load(f"{name}.png") for name in "abcd"]
    one_by_one = np.concatenate([loader.patches([picture]) for picture in pictures])
    np.testing.assert_array_equal(loader.patches(pictures), one_by_one)


def test_no_pictures_give_no_patches(tmp_path):
    loader, _ = loader_for(tmp_path)
    assert loader.patches([]).shape == (0, 1176)


def test_transparent_pictures_lie_on_white(tmp_path):
    rgba = np.zeros((4, 4, 4), dtype=np.uint8)
    rgba[..., 3] = 0
    rgba[0, 0] = (200, 0, 0, 128)
    image = Image.fromarray(rgba)
    image.save(tmp_path / "rgba.png")
    image.convert("LA").save(tmp_path / "la.png")
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([0, 0, 0] * 4)
    palette.save(tmp_path / "p.png", transparency=3)
    pixels = np.asarray(read_picture(tmp_path / "rgba.png"))
    assert pixels[2, 2].tolist() == [255, 255, 255]
    # 128/255 of (200, 0, 0) over white; the last bit depends on Pillow's rounding.
    np.testing.assert_allclose(pixels[0, 0], [227, 127, 127], atol=1)
    assert np.asarray(read_picture(tmp_path / "la.png"))[2, 2].tolist() == [255, 255, 255]
    assert np.asarray(read_picture(tmp_path / "p.png"))[2, 2].tolist() == [255, 255, 255]


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.asarray(read_picture(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_other_kinds_become_rgb(tmp_path):
    Image.new("CMYK", (6, 6), (0, 0, 0, 0)).save(tmp_path / "cmyk.jpg")
    Image.new("L", (6, 6), 90).save(tmp_path / "grey.png")
    Image.new("1", (6, 6), 1).save(tmp_path / "bits.png")
    assert np.asarray(read_picture(tmp_path / "cmyk.jpg")).min() >= 250
    assert np.asarray(read_picture(tmp_path / "grey.png"))[0, 0].tolist() == [90, 90, 90]
    assert np.asarray(read_picture(tmp_path / "bits.png"))[0, 0].tolist() == [255, 255, 255]


def test_exif_orientation_is_applied(tmp_path):
    image = noise_picture(8, 4)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    turned = read_picture(tmp_path / "turned.png")
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def test_first_frame_of_an_animation_counts(tmp_path):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(read_picture(tmp_path / "moving.gif"))[0, 0].tolist() == [255, 0, 0]


def reason_of(call):
    with pytest.raises(PictureError) as caught:
        call()
    return caught.value.reason, str(caught.value)


def test_a_bomb_is_refused_by_its_header(tmp_path, monkeypatch):
    """The pixels are never decoded: the file is cut off right after its header, and the size is what it fails on."""
    Image.new("1", (5000, 4000)).save(tmp_path / "bomb.png")
    data = (tmp_path / "bomb.png").read_bytes()[:60]
    (tmp_path / "bomb.png").write_bytes(data)
    monkeypatch.setattr(decode, "MAX_SOURCE_PIXELS", 10_000_000)
    reason, message = reason_of(lambda: read_picture(tmp_path / "bomb.png"))
    assert reason == "too_large" and "20000000" in message and "10000000" in message


def test_pillows_own_limit_is_reported_alike(tmp_path, monkeypatch):
    noise_picture(40, 40).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert reason_of(lambda: read_picture(tmp_path / "a.png"))[0] == "too_large"


def test_broken_missing_and_narrow_pictures_have_reasons(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    noise_picture(60, 60).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    Image.new("RGB", (900, 2)).save(tmp_path / "narrow.png")
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "float.tiff")
    assert reason_of(lambda: read_picture(tmp_path / "broken.png"))[0] == "unreadable_picture"
    assert reason_of(lambda: read_picture(tmp_path / "cut.png"))[0] == "unreadable_picture"
    assert reason_of(lambda: read_picture(tmp_path / "none.png"))[0] == "missing_picture"
    assert reason_of(lambda: read_picture(tmp_path / "narrow.png"))[0] == "aspect_ratio"
    assert reason_of(lambda: read_picture(tmp_path / "float.tiff"))[0] == "unsupported_mode"


def test_paths_stay_inside_the_data_folder(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    noise_picture(40, 40).save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    loader, _ = loader_for(root)
    for path in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "x/../../secret.png"):
        assert reason_of(partial(loader.load, path))[0] == "outside_data_folder"


def test_cache_is_bounded_in_bytes_and_never_changes_a_picture(tmp_path):
    for i in range(6):
        noise_picture(60, 60).save(tmp_path / f"{i}.png")
    small, _ = loader_for(tmp_path, image_size=56, cache_bytes=2 * 3 * 56 * 56)
    large, _ = loader_for(tmp_path, image_size=56)
    for _ in range(2):
        for i in range(6):
            np.testing.assert_array_equal(small.load(f"{i}.png"), large.load(f"{i}.png"))
            assert small._cached_bytes == sum(p.nbytes for p in small._cache.values()) <= 2 * 3 * 56 * 56
    with pytest.raises(ValueError, match="read-only"):
        large.load("0.png")[0, 0, 0] = 1


def test_sizes_that_do_not_fit_the_tower_are_refused(tmp_path):
    with pytest.raises(ValueError, match="image_size 70 is not a multiple of 28 .*: 56 or 84 is"):
        loader_for(tmp_path, image_size=70)
    vision = VisionGeometry(patch_size=7, temporal_patch_size=2, spatial_merge_size=2)
    with pytest.raises(ValueError, match=r"\(14, 2, 2\).*\(7, 2, 2\)"):
        PictureLoader(tmp_path, processor=Qwen2VLImageProcessorPil(), vision=vision)


def test_folder_without_processor_settings_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no preprocessor_config.json"):
        load_processor(tmp_path)


def test_saved_processor_settings_come_back(model_folder):
    processor = load_processor(model_folder)
    assert (processor.patch_size, processor.size["longest_edge"]) == (7, 3136)


def test_a_cached_batch_costs_little(data_folder, model_folder, vision):
    """32 pictures of 70 x 70 from the cache in under 20 ms: preparing must not compete with the training step."""
    loader = PictureLoader(data_folder, processor=load_processor(model_folder), vision=vision, image_size=70)
    names = [f"images/{i % 24}.png" for i in range(32)]
    durations = []
    for _ in range(10):
        start = time.perf_counter()
        loader.patches([loader.load(name) for name in names])
        durations.append(time.perf_counter() - start)
    # The fastest of ten: other processes may hold the cores for a while. Typically 2 ms.
    assert min(durations) < 0.020
