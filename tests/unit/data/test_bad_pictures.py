"""Generated bad pictures: each is refused under its documented reason, or is a picture; none becomes a blank one."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megatron_cocoa.architecture import VisionGeometry
from megatron_cocoa.data import stored
from megatron_cocoa.data.decode import PictureError
from megatron_cocoa.data.preprocess import PictureLoader
from megatron_cocoa.data.stored import StoredPicture

NOISE = np.random.default_rng(5).integers(1, 256, size=(48, 64, 3), dtype=np.uint8)
FORMATS = ("png", "jpg", "webp", "gif", "bmp", "tiff", "ppm")


def encoded(extension: str, image: Image.Image | None = None) -> bytes:
    buffer = io.BytesIO()
    name = {"jpg": "JPEG", "ppm": "PPM"}.get(extension, extension.upper())
    (image or Image.fromarray(NOISE)).save(buffer, format=name)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces this many pixels and holds one row of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def with_size(extension: str, width: int, height: int) -> bytes:
    """A small file whose header is changed to announce a large picture."""
    data = bytearray(encoded(extension))
    if extension == "gif":
        # The screen and its first frame, whose descriptor begins with a comma.
        frame = data.index(b"\x2c\0\0\0\0")
        data[6:10] = data[frame + 5 : frame + 9] = struct.pack("<HH", width, height)
    elif extension == "bmp":
        data[18:26] = struct.pack("<ii", width, height)
    elif extension == "jpg":
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = struct.pack(">HH", height, width)
    elif extension == "ppm":
        return f"P6 {width} {height} 255\n".encode() + bytes(100)
    return bytes(data)


BYTES: dict[str, tuple[bytes, set[str]]] = {
    **{f"zero-byte.{e}": (b"", {"unreadable_picture"}) for e in FORMATS},
    **{
        f"cut-at-{percent}.{e}": (encoded(e)[: len(encoded(e)) * percent // 100], {"unreadable_picture"})
        for e in FORMATS
        for percent in (5, 50, 90)
    },
    **{f"magic-only.{e}": (encoded(e)[:8], {"unreadable_picture"}) for e in FORMATS},
    "random.png": (np.random.default_rng(1).bytes(500), {"unreadable_picture"}),
    "random.jpg": (np.random.default_rng(2).bytes(500), {"unreadable_picture"}),
    "text.png": (b"this is text", {"unreadable_picture"}),
    "page.jpg": (b"<html><body>404 Not Found</body></html>", {"unreadable_picture"}),
    "vector.png": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", {"unreadable_picture"}),
    "document.png": (b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n", {"unreadable_picture"}),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", {"unreadable_picture"}),
    "bomb-60000.png": (png_header(60_000, 60_000), {"too_large"}),
    "bomb-just.png": (png_header(8_001, 8_000), {"too_large"}),
    "bomb-thin.png": (png_header(2**31 - 1, 1), {"too_large", "aspect_ratio", "unreadable_picture"}),
    "bomb.gif": (with_size("gif", 65_535, 65_535), {"too_large"}),
    "bomb.bmp": (with_size("bmp", 60_000, 60_000), {"too_large"}),
    "bomb.jpg": (with_size("jpg", 65_500, 65_500), {"too_large"}),
    "bomb.ppm": (with_size("ppm", 60_000, 60_000), {"too_large"}),
    "short-of-data.png": (png_header(500, 500), {"unreadable_picture"}),
    "no-width.png": (png_header(0, 10), {"unreadable_picture"}),
    "negative.bmp": (with_size("bmp", -5, 4), {"unreadable_picture", "too_large"}),
    "corrupt-checksum.png": (encoded("png")[:40] + b"\xff" + encoded("png")[41:], {"unreadable_picture"}),
    "1-by-5000.png": (encoded("png", Image.new("RGB", (1, 5000), "red")), {"aspect_ratio"}),
    "5000-by-1.png": (encoded("png", Image.new("RGB", (5000, 1), "red")), {"aspect_ratio"}),
    "1-by-201.jpg": (encoded("jpg", Image.new("RGB", (1, 201), "red")), {"aspect_ratio"}),
    "float.tiff": (encoded("tiff", Image.fromarray(np.ones((9, 9), np.float32))), {"unsupported_mode"}),
    "negative-grey.tiff": (encoded("tiff", Image.fromarray(np.full((9, 9), -3, np.int32))), {"unsupported_mode"}),
}

GOOD: dict[str, bytes] = {
    "1-by-1.png": encoded("png", Image.new("RGB", (1, 1), "red")),
    "1-by-200.png": encoded("png", Image.new("RGB", (1, 200), "red")),
    "wrong-extension.jpg": encoded("png"),
    "wrong-extension.png": encoded("jpg"),
    "no-extension": encoded("webp"),
    "deep.png": encoded("png", Image.fromarray(np.full((9, 9), 40_000, np.uint16))),
}


@pytest.fixture
def loader(tmp_path) -> PictureLoader:
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (root / "good.png").write_bytes(encoded("png"))
    (tmp_path / "secret.png").write_bytes(encoded("png"))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "linked").symlink_to(tmp_path)
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "dangling.png").symlink_to(root / "nothing.png")
    vision = VisionGeometry(patch_size=14, temporal_patch_size=2, spatial_merge_size=2)
    return PictureLoader(root, processor=Qwen2VLImageProcessorPil(), vision=vision)


@pytest.mark.parametrize("name", BYTES)
def test_bad_bytes_are_refused_with_a_reason(loader, tmp_path, name):
    """Claim: a row with this picture is skipped and counted under its reason; a blank picture never stands for it."""
    data, reasons = BYTES[name]
    (tmp_path / "data" / name).write_bytes(data)
    with pytest.raises(PictureError) as caught:
        loader.load(name)
    assert caught.value.reason in reasons, caught.value
    assert name in str(caught.value)
    assert not loader._cache


@pytest.mark.parametrize("name", [name for name in BYTES if "bomb" in name or "-by-" in name])
def test_bombs_are_refused_by_their_header_in_the_plan_already(loader, tmp_path, name):
    """Claim: nothing is decoded to find out that a picture is too large or too thin."""
    data, reasons = BYTES[name]
    (tmp_path / "data" / name).write_bytes(data)
    with pytest.raises(PictureError) as caught:
        loader.planned_grid(name)
    assert caught.value.reason in reasons


@pytest.mark.parametrize("name", GOOD)
def test_odd_but_whole_pictures_are_used(loader, tmp_path, name):
    (tmp_path / "data" / name).write_bytes(GOOD[name])
    picture = loader.load(name)
    assert picture.shape[1] % 28 == picture.shape[2] % 28 == 0 and picture.max() > 0
    assert loader.planned_grid(name) == loader.grid(picture)


PATHS = {
    "missing.png": "missing_picture",
    "images": "missing_picture",
    "dangling.png": "missing_picture",
    "loop.png": "missing_picture",
    "nul\0byte.png": "missing_picture",
    "x" * 5000 + ".png": "missing_picture",
    "../secret.png": "outside_data_folder",
    "images/../../secret.png": "outside_data_folder",
    "link.png": "outside_data_folder",
    "linked/secret.png": "outside_data_folder",
    "/etc/hostname": "outside_data_folder",
    "//etc/hostname": "outside_data_folder",
    "..": "outside_data_folder",
}


@pytest.mark.parametrize("path", PATHS, ids=[repr(path[:24]) for path in PATHS])
@pytest.mark.parametrize("stored", [False, True], ids=["folder", "source"])
def test_bad_paths_are_refused_with_a_reason(loader, tmp_path, path, stored):
    """Claim: nothing outside of the folder is ever opened, and a source with a root of its own is no way round it."""
    ref = StoredPicture(str(tmp_path / "data"), path) if stored else path
    with pytest.raises(PictureError) as caught:
        loader.load(ref)
    assert caught.value.reason == PATHS[path], caught.value


@pytest.mark.parametrize(
    ("kind", "place", "reason"),
    [
        ("slice", (10**9, 100), "unreadable_picture"),
        ("slice", (0, 10), "unreadable_picture"),
        ("slice", (0, 2**40), "too_large"),
    ],
)
def test_bad_places_in_a_shard_are_refused(loader, tmp_path, kind, place, reason):
    with pytest.raises(PictureError) as caught:
        loader.load(StoredPicture(str(tmp_path / "data"), "good.png", kind, place))
    assert caught.value.reason == reason


def arrow_file(path) -> bytes:
    table = pa.table({"image": [encoded("png")] * 3, "text": ["a", "b", "c"]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("kept", "place", "column", "reason"),
    [
        (1.0, (1,), "image", None),
        (0.5, (1,), "image", "unreadable_picture"),
        (0.0, (1,), "image", "unreadable_picture"),
        (None, (1,), "image", "missing_picture"),
        (1.0, (3,), "image", "unreadable_picture"),
        (1.0, (1,), "other", "unreadable_picture"),
        (1.0, (1, 0), "image", "unreadable_picture"),
        (1.0, (1,), "text", "missing_picture"),
    ],
)
def test_bad_cells_of_an_arrow_file_are_refused(loader, tmp_path, kept, place, column, reason):
    """Claim: a file that is cut short, is gone or is another costs its rows and not the run; the cause is chained."""
    path = tmp_path / "data" / "pairs.arrow"
    whole = arrow_file(path)
    path.unlink()
    if kept is not None:
        path.write_bytes(whole[: int(len(whole) * kept)])
    ref = StoredPicture(str(tmp_path / "data"), path.name, "cell", place, column)
    if reason is None:
        assert loader.load(ref).shape[0] == 3 and loader.planned_grid(ref)
        return
    for call in (loader.load, loader.planned_grid):
        with pytest.raises(PictureError, match=path.name) as caught:
            call(ref)
        assert caught.value.reason == reason
        assert reason == "missing_picture" or caught.value.__cause__ is not None


@pytest.mark.parametrize("refusals", [1, 2])
def test_what_the_file_system_refuses_once_is_asked_for_again(loader, tmp_path, monkeypatch, refusals):
    """Claim: one error of a network file system costs nothing, a second one the row; none of them ends the run."""
    read, left = stored._slice, [OSError(5, "Input/output error")] * refusals

    def refusing(*args):
        if left:
            raise left.pop()
        return read(*args)

    monkeypatch.setattr(stored, "_slice", refusing)
    data = (tmp_path / "data" / "good.png").read_bytes()
    ref = StoredPicture(str(tmp_path / "data"), "good.png", "slice", (0, len(data)))
    if refusals == 1:
        assert loader.load(ref).max() > 0
        return
    with pytest.raises(PictureError, match="Input/output error") as caught:
        loader.load(ref)
    assert caught.value.reason == "unreadable_picture" and isinstance(caught.value.__cause__, OSError)
