"""Picture files to upright 8-bit RGB, as Hugging Face makes them, and everything that is refused on the way.

Transparent pictures lie on white, and grey, palettes and CMYK become RGB, as in transformers' ``convert_to_rgb``; the
EXIF orientation is applied as in its ``load_image``; of an animation the first frame counts. One departure: 16-bit grey
is scaled to 8 bits, where Pillow, and so transformers, would clip it at 255 and leave a white picture.

A file is refused by its header before a pixel is decoded, so that a small file cannot fill the memory, and only by
Pillow's decoders of raster formats: the one for PostScript would start another program.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps

MAX_SOURCE_PIXELS = 64_000_000
"""A file that announces more pixels is refused."""

MAX_ASPECT_RATIO = 200
"""Transformers' ``smart_resize`` refuses thinner pictures, too."""

_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")

_FILTERS_LOCK = threading.Lock()
_PICTURE_LOCKS = tuple(threading.Lock() for _ in range(64))


class PictureError(ValueError):
    """A picture that cannot be used; ``reason`` is a short key under which such pictures are counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_picture(source: Path | IO[bytes], *, name: str | Path | None = None) -> Image.Image:
    """Decode a picture to 8-bit RGB at its own size.

    Args:
        source: a file, or its bytes as a stream.
        name: for error messages; the file's path by default.

    Raises:
        PictureError: with a reason and the numbers, for whatever cannot be decoded to that.
    """
    name = name or source
    with _opened(source, name) as image:
        return accept_picture(image, name)


def picture_size(source: Path | IO[bytes], *, name: str | Path | None = None) -> tuple[int, int]:
    """``(height, width)`` by the header alone, before any EXIF rotation.

    Raises:
        PictureError: for what ``read_picture`` refuses by the header.
    """
    name = name or source
    with _opened(source, name) as image:
        _check_size(image, name)
        return image.height, image.width


def accept_picture(image: Image.Image, name: str | Path) -> Image.Image:
    """8-bit RGB of an opened picture, upright, at its own size; what is too large is refused before it is decoded.

    Where nothing has to change that is ``image`` itself.

    Raises:
        PictureError: naming ``name``, with a reason and the numbers, for whatever cannot be decoded to that.
    """
    _check_size(image, name)
    with _decoding(name):
        return _to_rgb(_upright(image), name)


def _check_size(image: Image.Image, name: str | Path) -> None:
    """Refuse by the header what would be too large or too thin.

    Raises:
        PictureError: with the numbers.
    """
    width, height = image.size
    if width < 1 or height < 1:
        raise PictureError("unreadable_picture", f"{name} is {width} x {height} pixels")
    if width * height > MAX_SOURCE_PIXELS:
        found = f"{name} is {width} x {height} = {width * height} pixels"
        raise PictureError("too_large", f"{found}, at most {MAX_SOURCE_PIXELS} are decoded")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise PictureError(
            "aspect_ratio", f"{name} is {width} x {height} pixels: at most {MAX_ASPECT_RATIO} to 1 is accepted"
        )


@contextmanager
def _opened(source: Path | IO[bytes], name: str | Path) -> Iterator[Image.Image]:
    # Path.is_file would raise for a name that is too long.
    if isinstance(source, Path) and not os.path.isfile(source):
        raise PictureError("missing_picture", f"{name} is not a file")
    with _decoding(name):
        # Pillow warns of large pictures by its own limit; ours is checked before decoding. The filters are the whole
        # process's, so that threads take turns.
        with _FILTERS_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(source, formats=_raster_formats())
        with opened as image:
            yield image


@contextmanager
def _decoding(name: str | Path) -> Iterator[None]:
    try:
        yield
    except (PictureError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise PictureError("too_large", f"{name}: at most {MAX_SOURCE_PIXELS} pixels are decoded: {error}") from error
    except Exception as error:
        # For broken files Pillow's decoders raise nearly everything: SyntaxError, struct.error, KeyError and so on.
        raise PictureError("unreadable_picture", f"{name} cannot be decoded: {error!r}") from error


@cache
def _raster_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _upright(image: Image.Image) -> Image.Image:
    """``image`` turned as its EXIF data say; itself where they say nothing, for ``exif_transpose`` would copy it."""
    # Threads may be given the same picture, and Pillow decodes it in place: by its identity they take turns.
    with _PICTURE_LOCKS[id(image) // 16 % len(_PICTURE_LOCKS)]:
        image.load()
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image, name: str | Path) -> Image.Image:
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            found = f"[{grey.min()}, {grey.max()}]"
            raise PictureError("unsupported_mode", f"{name} has grey values in {found}, needs [0, 65535]")
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise PictureError("unsupported_mode", f"{name} holds floating-point values, which have no defined white")
    if "A" in image.getbands() or "a" in image.mode or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
