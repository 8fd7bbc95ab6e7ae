"""Picture files to patches, with the arithmetic of transformers' ``Qwen2VLImageProcessorPil``.

A run sees each picture many times, and decoding dominates. So the decoded, resized 8-bit picture is cached, and
only normalising and cutting into patches is done per step: a table lookup per pixel (the 256 x 3 results of the
processor's own arithmetic) and one transpose for all pictures of a size. Tests prove it equal to the processor.

Policy for what pictures may be: transparent ones lie on white, grey and CMYK become RGB, 16 bits become 8, the EXIF
orientation is applied, of an animation the first frame counts. What is too large is refused before it is decoded.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from megatron_cocoa.data.geometry import VisionGeometry

_MAX_SOURCE_PIXELS = 64_000_000
_MAX_ASPECT_RATIO = 200
_CACHE_BYTES = 256 * 2**20


class PictureError(ValueError):
    """A picture that cannot be used; ``reason`` is a short key under which such pictures are counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class PictureLoader:
    """Reads, sizes and caches pictures below one folder, and turns them into patches.

    Args:
        root: data folder; image paths are relative to it and may not leave it, by ``..`` or by a link.
        processor: gives resampling, pixel limits and normalisation.
        vision: must agree with the processor's patch and merge sizes.
        image_size: side in pixels of the square that every picture is resized to; None keeps the aspect ratio
            within the processor's limits.
        cache_bytes: 8-bit pixels kept in memory.
        max_source_pixels: a file that announces more is refused before it is decoded.

    Raises:
        ValueError: if ``image_size`` is not a multiple of ``patch_size * spatial_merge_size``, or the processor
            and ``vision`` disagree.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        processor: Qwen2VLImageProcessorPil,
        vision: VisionGeometry,
        image_size: int | None = None,
        cache_bytes: int = _CACHE_BYTES,
        max_source_pixels: int = _MAX_SOURCE_PIXELS,
    ) -> None:
        found = (processor.patch_size, processor.merge_size, processor.temporal_patch_size)
        needed = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        if found != needed:
            raise ValueError(
                f"preprocessor_config.json has patch, merge and temporal sizes {found}, config.json has {needed}: "
                f"the two files must come from one model"
            )
        if image_size is not None and (image_size < 1 or image_size % vision.size_factor):
            raise ValueError(
                f"image_size {image_size} is not a multiple of {vision.size_factor} pixels "
                f"(patch_size {vision.patch_size} x spatial_merge_size {vision.spatial_merge_size})"
            )
        self._root = Path(root).resolve()
        self._processor = processor
        self._vision = vision
        self._image_size = image_size
        self._max_source_pixels = max_source_pixels
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._table = _normalisation_table(processor)

    def load(self, image_path: str) -> np.ndarray:
        """The picture at ``image_path`` (relative to the root), resized.

        Returns:
            uint8 ``(3, height, width)``, read-only; both sides are multiples of ``vision.size_factor``.

        Raises:
            PictureError: if the file is missing, lies outside of the root, is too large, too narrow, broken, or of
                a kind that has no 8-bit RGB meaning.
        """
        with self._lock:
            picture = self._cache.get(image_path)
            if picture is not None:
                self._cache.move_to_end(image_path)
                return picture
        picture = self._resize(read_picture(self._inside_root(image_path), max_pixels=self._max_source_pixels))
        picture.setflags(write=False)
        with self._lock:
            if picture.nbytes <= self._cache_bytes and image_path not in self._cache:
                self._cache[image_path] = picture
                self._cached_bytes += picture.nbytes
            while self._cached_bytes > self._cache_bytes:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return picture

    def prepare(self, image: Image.Image, *, name: str = "the picture in memory") -> np.ndarray:
        """A picture that is in memory, under the same policy as one on disk; it is not cached.

        Args:
            image: of any mode that ``load`` accepts; it is left as it is.
            name: for error messages.

        Returns:
            uint8 ``(3, height, width)``, read-only, as from ``load``.

        Raises:
            PictureError: as ``load``, for the picture itself.
        """
        picture = self._resize(accept_picture(image, name, max_pixels=self._max_source_pixels))
        picture.setflags(write=False)
        return picture

    def grid(self, picture: np.ndarray) -> tuple[int, int, int]:
        """``(t, h, w)`` in patches of a picture from ``load``."""
        size = self._vision.patch_size
        return 1, picture.shape[1] // size, picture.shape[2] // size

    def patches(self, pictures: list[np.ndarray]) -> np.ndarray:
        """Normalise and cut pictures from ``load``.

        Returns:
            float32 ``(patches, patch_dim)``, the pictures one after the other, each in the processor's order: merged
            units row by row, the patches of a unit next to each other, and in a patch channel, time, row, column.
        """
        vision = self._vision
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
        p, m, t = self._vision.patch_size, self._vision.spatial_merge_size, self._vision.temporal_patch_size
        n, channels, height, width = pictures.shape
        units_h, units_w = height // (p * m), width // (p * m)
        # Cutting the 8-bit pixels first moves a quarter of the bytes that cutting the normalised ones would.
        blocks = pictures.reshape(n, channels, units_h, m, p, units_w, m, p).transpose(0, 2, 5, 3, 6, 1, 4, 7)
        blocks = np.ascontiguousarray(blocks).reshape(-1, channels, p * p)
        target = out.reshape(-1, channels, t, p * p)
        for channel in range(channels):
            target[:, channel] = self._table[channel][blocks[:, channel]][:, None]

    def _inside_root(self, image_path: str) -> Path:
        path = (self._root / image_path).resolve()
        if not path.is_relative_to(self._root):
            raise PictureError("outside_data_folder", f"image path {image_path!r} leaves the data folder {self._root}")
        return path

    def _resize(self, image: Image.Image) -> np.ndarray:
        width, height = image.size
        if self._image_size is not None:
            target = (self._image_size, self._image_size)
        else:
            limits = self._processor.size
            height, width = smart_resize(
                height,
                width,
                factor=self._vision.size_factor,
                min_pixels=limits["shortest_edge"],
                max_pixels=limits["longest_edge"],
            )
            target = (width, height)
        image = image.resize(target, resample=self._processor.resample)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def load_processor(path: str | Path) -> Qwen2VLImageProcessorPil:
    """Read ``preprocessor_config.json`` of a Hugging Face folder.

    Raises:
        ValueError: if it is missing.
    """
    if not (Path(path) / "preprocessor_config.json").is_file():
        raise ValueError(f"{path} has no preprocessor_config.json: take it from the model's Hugging Face folder")
    return Qwen2VLImageProcessorPil.from_pretrained(str(path), local_files_only=True)


def read_picture(path: Path, *, max_pixels: int = _MAX_SOURCE_PIXELS) -> Image.Image:
    """Decode a picture file to 8-bit RGB at its own size.

    Raises:
        PictureError: with a reason and the numbers, for whatever cannot be decoded to that.
    """
    if not path.is_file():
        raise PictureError("missing_picture", f"{path} is not a file")
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures by its own limit; ours is checked below, before decoding.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return accept_picture(image, path, max_pixels=max_pixels)
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError("too_large", f"{path}: at most {max_pixels} pixels are decoded: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise PictureError("unreadable_picture", f"{path} cannot be decoded: {error}") from error


def accept_picture(image: Image.Image, name: str | Path, *, max_pixels: int = _MAX_SOURCE_PIXELS) -> Image.Image:
    """8-bit RGB of an opened picture, upright, at its own size; what is too large is refused before it is decoded.

    Raises:
        PictureError: naming ``name``, with a reason and the numbers, for whatever cannot be decoded to that.
    """
    _check_size(image, name, max_pixels)
    try:
        return _to_rgb(ImageOps.exif_transpose(image), name)
    except PictureError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        # Pillow's decoders raise SyntaxError and ValueError, too, for broken files.
        raise PictureError("unreadable_picture", f"{name} cannot be decoded: {error}") from error


def _check_size(image: Image.Image, path: str | Path, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise PictureError("unreadable_picture", f"{path} is {width} x {height} pixels")
    if width * height > max_pixels:
        raise PictureError(
            "too_large", f"{path} is {width} x {height} = {width * height} pixels, at most {max_pixels} are decoded"
        )
    if max(width, height) > _MAX_ASPECT_RATIO * min(width, height):
        raise PictureError(
            "aspect_ratio", f"{path} is {width} x {height} pixels: at most {_MAX_ASPECT_RATIO} to 1 is accepted"
        )


def _to_rgb(image: Image.Image, path: str | Path) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit grey at 255 instead of scaling it.
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            found = f"[{grey.min()}, {grey.max()}]"
            raise PictureError("unsupported_mode", f"{path} has grey values in {found}, needs [0, 65535]")
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise PictureError("unsupported_mode", f"{path} holds floating-point values, which have no defined white")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _normalisation_table(processor: Qwen2VLImageProcessorPil) -> list[np.ndarray]:
    """For each channel the 256 results of the processor's own rescaling and normalising: equal by construction."""
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    if processor.do_rescale:
        levels = processor.rescale(levels, processor.rescale_factor)
    if processor.do_normalize:
        levels = processor.normalize(levels, processor.image_mean, processor.image_std)
    return [np.asarray(levels[channel, 0], dtype=np.float32) for channel in range(3)]
