"""The few numbers of the vision tower that decide how many tokens a picture takes, and where they go."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class VisionGeometry:
    """Patches and merged units of Qwen2-VL's and Qwen2.5-VL's tower.

    Args:
        patch_size: side of a square patch in pixels.
        temporal_patch_size: frames per patch; a still picture is repeated this often.
        spatial_merge_size: a merged unit, that is one placeholder token, is this many patches square.
        tokens_per_second: steps of the time axis of M-RoPE per second of video (Qwen2.5-VL), or None where
            video frames count one step each (Qwen2-VL).
        channels: colour channels.
    """

    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    tokens_per_second: float | None = None
    channels: int = 3

    def __post_init__(self) -> None:
        for name in ("patch_size", "temporal_patch_size", "spatial_merge_size", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, needs 1 or more")

    @property
    def patch_dim(self) -> int:
        """Values in one row of ``pixel_values``."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def patches_per_unit(self) -> int:
        """Consecutive rows of ``pixel_values`` that make one merged unit."""
        return self.spatial_merge_size**2

    @property
    def unit_dim(self) -> int:
        """Values in one merged unit."""
        return self.patches_per_unit * self.patch_dim

    @property
    def size_factor(self) -> int:
        """Picture sides are multiples of this many pixels."""
        return self.patch_size * self.spatial_merge_size

    def num_units(self, grid_thw: tuple[int, int, int]) -> int:
        """Placeholder tokens of a picture or video of ``grid_thw`` patches."""
        t, h, w = grid_thw
        return t * h * w // self.patches_per_unit

    @classmethod
    def from_model_folder(cls, path: str | Path) -> VisionGeometry:
        """Read the numbers from the ``config.json`` of a Hugging Face folder.

        Raises:
            ValueError: if there is no readable ``config.json`` with a ``vision_config``.
        """
        file = Path(path) / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            vision = config["vision_config"]
        except (OSError, json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{file} is not the config.json of a Qwen2-VL or Qwen2.5-VL model: {error!r}") from error
        timed = config.get("model_type") == "qwen2_5_vl"
        return cls(
            patch_size=vision.get("patch_size", 14),
            temporal_patch_size=vision.get("temporal_patch_size", 2),
            spatial_merge_size=vision.get("spatial_merge_size", 2),
            tokens_per_second=vision.get("tokens_per_second", 4) if timed else None,
            channels=vision.get("in_channels", vision.get("in_chans", 3)),
        )
