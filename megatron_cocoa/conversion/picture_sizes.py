"""How pictures are sized for a model: as the model itself says, or as a user asks instead."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_cocoa.checkpoint.info import CheckpointInfo
from megatron_cocoa.config import NATIVE, ImageSize
from megatron_cocoa.conversion.companions import run_settings

SIZES = ("image_size", "min_image_tokens", "max_image_tokens")
"""Settings of a stage, and keys of ``CheckpointInfo.pictures``, that say how pictures are sized."""

IMAGE_SIZE_KEY = "cocoa_image_size"
"""Where the ``config.json`` of an exported folder gives the side in pixels of the square that pictures are resized to;
absent where they keep their shape."""


@dataclass(frozen=True)
class PictureSizes:
    """One square for all pictures, or limits for those that keep their shape.

    image_size: side of the square in pixels; None where pictures keep their shape.
    min_image_tokens, max_image_tokens: merged units of a picture that keeps its shape; None for the limits of
        ``preprocessor_config.json``.
    """

    image_size: int | None = None
    min_image_tokens: int | None = None
    max_image_tokens: int | None = None

    @classmethod
    def of_config(cls, content: dict[str, Any]) -> PictureSizes:
        """What the ``config.json`` of a Hugging Face folder says; limits of tokens stand in another file there."""
        return cls(image_size=content.get(IMAGE_SIZE_KEY))

    @classmethod
    def of_checkpoint(cls, path: Path, info: CheckpointInfo) -> PictureSizes:
        """Those of the stage that trained a checkpoint; of an imported one, what its ``config.json`` said.

        Raises:
            ValueError: if the settings of its run are needed, since it does not say, and are not readable.
        """
        stage = info.pictures or run_settings(path).get(info.stage)
        return cls(**{name: stage.get(name) for name in SIZES}) if stage else cls.of_config(info.hf_config)

    def overridden_by(
        self, *, image_size: ImageSize | None, min_image_tokens: int | None, max_image_tokens: int | None
    ) -> PictureSizes:
        """These sizes, where nothing is asked for; else what is asked for.

        Args:
            image_size: side of a square in pixels, or ``native`` for pictures that keep their shape.
            min_image_tokens, max_image_tokens: limits, which only pictures that keep their shape have; they imply
                ``native``, and where one is given, None stands for that of ``preprocessor_config.json``.

        Raises:
            ValueError: for another word than ``native``.
        """
        if isinstance(image_size, str) and image_size != NATIVE:
            raise ValueError(f"image_size is {image_size!r}, needs a side in pixels, {NATIVE}, or None for the model's")
        side = None if image_size == NATIVE else image_size
        if side is not None or (min_image_tokens, max_image_tokens) != (None, None):
            return PictureSizes(side, min_image_tokens, max_image_tokens)
        return replace(self, image_size=None) if image_size == NATIVE else self
