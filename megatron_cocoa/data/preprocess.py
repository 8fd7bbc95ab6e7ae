"""Picture files to patches, with the arithmetic of transformers' ``Qwen2VLImageProcessorPil``.

A run sees each picture many times, and decoding dominates. So the decoded, resized 8-bit picture is cached, and
only normalising and cutting into patches (``patches.py``) is done per step. Tests prove it equal to the processor.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from megatron_cocoa.architecture import VisionGeometry
from megatron_cocoa.config.checks import nearest_multiples
from megatron_cocoa.data.decode import PictureError, accept_picture, picture_size, read_picture
from megatron_cocoa.data.patches import PatchCutter
from megatron_cocoa.data.size_cache import SizeCache
from megatron_cocoa.data.stored import PictureRef, open_picture

CACHE_BYTES = 256 * 2**20
_CACHED_SIZES = 2**20


class PictureLoader:
    """Reads, sizes and caches pictures below one folder, and turns them into patches.

    Args:
        root: data folder; image paths are relative to it and may not leave it, by ``..`` or by a link.
        processor: gives resampling, pixel limits and normalisation.
        vision: must agree with the processor's patch and merge sizes.
        image_size: side in pixels of the square that every picture is resized to; None keeps the aspect ratio
            within the limits below.
        min_image_tokens, max_image_tokens: merged units of a picture, where ``image_size`` is None; None for the
            processor's own limits.
        cache_bytes: 8-bit pixels kept in memory.

    Attributes:
        image_size: as above.
        cutter: turns pictures into patches; small, unlike the cache beside it.
        num_decoded: pictures read and decoded so far.

    Raises:
        ValueError: if ``image_size`` is not a multiple of ``patch_size * spatial_merge_size`` or comes with limits,
            the processor and ``vision`` disagree, or the limits are not in order.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        processor: Qwen2VLImageProcessorPil,
        vision: VisionGeometry,
        image_size: int | None = None,
        min_image_tokens: int | None = None,
        max_image_tokens: int | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        found = (processor.patch_size, processor.merge_size, processor.temporal_patch_size)
        needed = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        if found != needed:
            raise ValueError(
                f"preprocessor_config.json has patch, merge and temporal sizes {found}, config.json has {needed}: "
                f"the two files must come from one model"
            )
        check_image_size(image_size, vision)
        if image_size is not None and not min_image_tokens is max_image_tokens is None:
            raise ValueError(
                f"image_size {image_size} fixes the size of every picture: min_image_tokens {min_image_tokens} and "
                f"max_image_tokens {max_image_tokens} would have no effect; leave out the one or the others"
            )
        self._root = Path(root).resolve()
        self._processor = processor
        self._vision = vision
        self.image_size = image_size
        self._pixel_limits = limits_in_pixels(processor, min_tokens=min_image_tokens, max_tokens=max_image_tokens)
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: OrderedDict[PictureRef, np.ndarray] = OrderedDict()
        self._sizes = SizeCache(_CACHED_SIZES)
        self._lock = threading.Lock()
        self.num_decoded = 0
        self.cutter = PatchCutter.of_processor(processor, vision)

    @property
    def pixel_limits(self) -> tuple[int, int] | None:
        """Fewest and most pixels of a prepared picture; None where all are resized to one square."""
        return None if self.image_size is not None else self._pixel_limits

    @property
    def sizing(self) -> str:
        """What becomes of a picture, in words."""
        if self.image_size is not None:
            return f"pictures are resized to {self.image_size} x {self.image_size} pixels"
        return "pictures keep their shape, with {} to {} pixels".format(*self._pixel_limits)

    def load(self, image_path: PictureRef) -> np.ndarray:
        """The picture at ``image_path`` (relative to the root, or stored elsewhere), resized.

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
        source = open_picture(image_path, self._root)
        picture = self._resize(read_picture(source, name=str(image_path)))
        picture.setflags(write=False)
        with self._lock:
            self.num_decoded += 1
            if picture.nbytes <= self._cache_bytes and image_path not in self._cache:
                self._cache[image_path] = picture
                self._cached_bytes += picture.nbytes
            while self._cached_bytes > self._cache_bytes:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return picture

    def planned_grid(self, image_path: PictureRef) -> tuple[int, int, int]:
        """``grid`` of what ``load`` will return, by the file's header: nothing is decoded.

        An EXIF rotation, which the header may not tell, exchanges height and width.

        Raises:
            PictureError: for what ``load`` refuses before decoding.
        """
        size = self._vision.patch_size
        if self.image_size is not None:
            return 1, self.image_size // size, self.image_size // size
        found = self._sizes.get(image_path)
        if found is None:
            source = open_picture(image_path, self._root)
            found = picture_size(source, name=str(image_path))
            self._sizes.put(image_path, found)
        height, width = self._target_size(*found)
        return 1, height // size, width // size

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
        picture = self._resize(accept_picture(image, name))
        picture.setflags(write=False)
        return picture

    def grid(self, picture: np.ndarray) -> tuple[int, int, int]:
        """``(t, h, w)`` in patches of a picture from ``load``."""
        size = self._vision.patch_size
        return 1, picture.shape[1] // size, picture.shape[2] // size

    def patches(self, pictures: list[np.ndarray]) -> np.ndarray:
        """Normalise and cut pictures from ``load``; see ``PatchCutter``."""
        return self.cutter(pictures)

    def _resize(self, image: Image.Image) -> np.ndarray:
        height, width = self._target_size(image.height, image.width)
        image = image.resize((width, height), resample=self._processor.resample)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    def _target_size(self, height: int, width: int) -> tuple[int, int]:
        if self.image_size is not None:
            return self.image_size, self.image_size
        low, high = self._pixel_limits
        try:
            return smart_resize(height, width, factor=self._vision.size_factor, min_pixels=low, max_pixels=high)
        except ValueError as error:
            raise PictureError("aspect_ratio", f"a picture of {width} x {height} pixels: {error}") from error


def limits_in_pixels(
    processor: Qwen2VLImageProcessorPil, *, min_tokens: int | None, max_tokens: int | None
) -> tuple[int, int]:
    """Fewest and most pixels of a picture that keeps its shape, from merged units; None for the processor's own.

    Raises:
        ValueError: if the smallest picture would be larger than the largest.
    """
    per_token = (processor.patch_size * processor.merge_size) ** 2
    low = processor.size["shortest_edge"] if min_tokens is None else min_tokens * per_token
    high = processor.size["longest_edge"] if max_tokens is None else max_tokens * per_token
    if not 0 < low <= high:
        raise ValueError(
            f"pictures would need at least {low} and at most {high} pixels ({per_token} make one image token): the "
            f"limits are min_image_tokens {min_tokens} and max_image_tokens {max_tokens}, where null stands for those "
            f"of preprocessor_config.json"
        )
    return low, high


def check_image_size(image_size: int | None, vision: VisionGeometry, *, name: str = "image_size") -> None:
    """Refuse a square that cannot be cut into merged units.

    Args:
        image_size: side in pixels; None passes.
        vision: gives what it must be a multiple of.
        name: of the setting.

    Raises:
        ValueError: naming the nearest sizes that can.
    """
    if image_size is not None and (image_size < 1 or image_size % vision.size_factor):
        raise ValueError(
            f"{name} {image_size} is not a multiple of {vision.size_factor} pixels (patch_size {vision.patch_size} x "
            f"spatial_merge_size {vision.spatial_merge_size}): {nearest_multiples(image_size, vision.size_factor)} is"
        )


def processor_file(path: str | Path) -> Path | None:
    """The file of a Hugging Face folder that describes its image processor; None where there is none.

    transformers 5 saves the description as ``image_processor`` in ``processor_config.json``, and reads it there before
    it looks at ``preprocessor_config.json``.

    Raises:
        ValueError: if ``processor_config.json`` is not readable JSON.
    """
    nested, own = Path(path) / "processor_config.json", Path(path) / "preprocessor_config.json"
    try:
        if nested.is_file() and json.loads(nested.read_text(encoding="utf-8")).get("image_processor") is not None:
            return nested
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{nested} is not readable JSON: {error}") from error
    return own if own.is_file() else None


def load_processor(path: str | Path) -> Qwen2VLImageProcessorPil:
    """The image processor of a Hugging Face folder, see ``processor_file``.

    Raises:
        ValueError: if the folder has none.
    """
    if processor_file(path) is None:
        raise ValueError(
            f"{path} has no preprocessor_config.json, nor an image_processor in processor_config.json: take it from "
            f"the model's Hugging Face folder"
        )
    return Qwen2VLImageProcessorPil.from_pretrained(str(path), local_files_only=True)
