"""What reconstruction training hides: which text tokens, which image units, and what stands in their place.

Every draw is a pure function of (seed, epoch, sample id, purpose). So it does not depend on the order in which
samples are prepared, on the batch that a sample lands in, on the rank, or on how many ranks there are; and text
masks stay the same when the share of masked image units is changed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_cocoa.architecture import VisionGeometry

NoiseKind = Literal["normal", "shared", "zero", "mean"]
_VARIANCE_EPS = 1e-6


def seeded_generator(*key: object) -> np.random.Generator:
    """Random numbers that depend on ``key`` alone, the same on every machine and NumPy build."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode("utf-8"), digest_size=16).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))


def draw_text_mask(
    eligible: np.ndarray, *, ratio: float, at_least_one: bool, generator: np.random.Generator
) -> np.ndarray:
    """Choose text tokens to hide by independent Bernoulli draws.

    Args:
        eligible: int64 ``(candidates,)``: rows of the sample that may be masked. Row 0 is never one: the hidden
            state that predicts row ``i`` is that of row ``i - 1``.
        ratio: probability of each draw.
        at_least_one: pick one row uniformly where the draws picked none. This lifts the effective ratio on
            short texts.
        generator: source of the draws.

    Returns:
        int64 ``(masked,)``: the chosen rows, ascending.

    Raises:
        ValueError: if row 0 is among the candidates.
    """
    if eligible.size and eligible[0] < 1:
        raise ValueError("row 0 of a sample has no row before it that could predict it: it cannot be masked")
    chosen = eligible[generator.random(eligible.size) < ratio]
    if at_least_one and eligible.size and not chosen.size:
        chosen = eligible[generator.integers(eligible.size, size=1)]
    return chosen


def draw_unit_mask(num_units: int, *, ratio: float, generator: np.random.Generator) -> np.ndarray:
    """Choose merged image units to hide by independent Bernoulli draws.

    Returns:
        int64 ``(masked,)``: indices among the sample's ``num_units`` units, ascending.
    """
    return np.flatnonzero(generator.random(num_units) < ratio)


def draw_unit_noise(
    num_masked: int,
    unit_dim: int,
    *,
    patch_dim: int,
    kind: NoiseKind,
    generator: np.random.Generator,
    step_key: tuple[object, ...],
) -> np.ndarray | None:
    """What replaces masked units, in normalised pixel space.

    Args:
        num_masked: masked units of the sample.
        unit_dim: values per unit.
        patch_dim: values per patch; a unit holds one or several.
        kind: ``normal``: independent standard-normal values; ``shared``: one patch of such values for every patch of
            the whole global batch (MoCa, arXiv 2506.23115, draws one per batch); ``zero``; ``mean``: each unit's own
            mean.
        generator: the sample's own source.
        step_key: names the global batch, for ``shared``.

    Returns:
        float32 ``(num_masked, unit_dim)``, or None for ``mean``, which depends on the pixels.

    Raises:
        ValueError: for an unknown ``kind``.
    """
    shape = (num_masked, unit_dim)
    if kind == "normal":
        return generator.standard_normal(shape, dtype=np.float32)
    if kind == "shared":
        patch = seeded_generator(*step_key, "shared-noise").standard_normal(patch_dim, dtype=np.float32)
        return np.broadcast_to(np.tile(patch, unit_dim // patch_dim), shape)
    if kind == "zero":
        return np.zeros(shape, dtype=np.float32)
    if kind == "mean":
        return None
    raise ValueError(f"mae_noise is {kind!r}, needs one of normal, shared, zero, mean")


@dataclass(frozen=True)
class UnitNoise:
    """What stands over a sample's masked units, as the seeds it is drawn from: a few bytes for thousands of values.

    Args:
        kind: as of ``draw_unit_noise``.
        key: of the sample's own source, which drew ``num_units`` numbers for the mask before.
        num_units: merged units of the sample, or its patches where those are masked.
        num_masked: how many of them are masked.
        step_key: names the global batch.
    """

    kind: NoiseKind
    key: tuple[object, ...]
    num_units: int
    num_masked: int
    step_key: tuple[object, ...]

    def draw(self, unit_dim: int, *, patch_dim: int) -> np.ndarray | None:
        """``unit_dim`` values for each masked unit, or ``patch_dim`` for each masked patch.

        The same as ``draw_unit_noise`` right after the sample's mask, on any rank and at any time.

        Raises:
            ValueError: as ``draw_unit_noise``.
        """
        generator = seeded_generator(*self.key)
        generator.random(self.num_units)
        return draw_unit_noise(
            self.num_masked,
            unit_dim,
            patch_dim=patch_dim,
            kind=self.kind,
            generator=generator,
            step_key=self.step_key,
        )


def replace_units(
    pixel_values: np.ndarray,
    masked: np.ndarray,
    noise: np.ndarray | None,
    *,
    vision: VisionGeometry,
    by_patch: bool = False,
) -> None:
    """Overwrite masked merged units, or single patches, in place, before the vision tower sees them.

    Args:
        pixel_values: float32 ``(patches, patch_dim)``; a merged unit is ``spatial_merge_size**2`` consecutive rows.
        masked: int64 ``(masked,)``: indices of units, or of patches, in this array.
        noise: float32 ``(masked, unit_dim or patch_dim)``, or None for each one's own mean per colour channel.
        vision: sizes.
        by_patch: patches are masked.
    """
    patches = 1 if by_patch else vision.patches_per_unit
    units = pixel_values.reshape(-1, patches * vision.patch_dim)
    if noise is None:
        per_channel = vision.patch_dim // vision.in_channels
        by_channel = units[masked].reshape(-1, patches, vision.in_channels, per_channel)
        means = by_channel.mean(axis=(1, 3), keepdims=True)
        noise = np.broadcast_to(means, by_channel.shape).reshape(-1, units.shape[1])
    units[masked] = noise


def normalize_targets(units: np.ndarray, *, vision: VisionGeometry) -> np.ndarray:
    """Zero mean and unit variance per patch, as in MAE (arXiv 2111.06377, ``norm_pix_loss``).

    Args:
        units: float32 ``(masked_units, unit_dim)``.
        vision: sizes; a unit holds ``spatial_merge_size**2`` patches, each normalised by itself.
    """
    patches = units.reshape(-1, vision.patch_dim)
    mean = patches.mean(axis=1, keepdims=True)
    variance = patches.var(axis=1, ddof=1, keepdims=True)
    return ((patches - mean) / np.sqrt(variance + _VARIANCE_EPS)).reshape(units.shape)
