"""Masks and noise follow from (seed, epoch, sample) alone, hide the stated share, and keep the originals."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from megatron_cocoa.architecture import VisionGeometry
from megatron_cocoa.data import corruption

VISION = VisionGeometry(patch_size=3, temporal_patch_size=2, spatial_merge_size=2)


def text_mask(n, ratio=0.2, at_least_one=True, key=(1, 0, "a")):
    generator = corruption.seeded_generator(*key)
    return corruption.draw_text_mask(np.arange(1, n + 1), ratio=ratio, at_least_one=at_least_one, generator=generator)


def test_draws_repeat_and_depend_on_seed_epoch_sample_and_purpose():
    keys = [(1, 0, "a", "text"), (2, 0, "a", "text"), (1, 1, "a", "text"), (1, 0, "b", "text"), (1, 0, "a", "units")]
    draws = [tuple(corruption.seeded_generator(*key).random(8)) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [tuple(corruption.seeded_generator(*key).random(8)) for key in keys]


def test_keys_do_not_run_into_each_other():
    assert corruption.seeded_generator(1, 11).random() != corruption.seeded_generator(11, 1).random()
    assert corruption.seeded_generator("1", "23").random() != corruption.seeded_generator("12", "3").random()


def test_text_masks_hide_the_stated_share():
    masked = sum(text_mask(200, key=(i,)).size for i in range(200))
    # 40,000 draws at 0.2: standard error 0.002, four of them allowed.
    assert abs(masked / 40_000 - 0.2) < 0.008


def test_at_least_one_lifts_the_ratio_on_short_texts_as_documented():
    """20% of three tokens become (0.6 + 0.8**3) / 3 = 37%; without the rule they stay 20%."""
    with_rule = np.mean([text_mask(3, key=(i,)).size for i in range(4000)]) / 3
    without = np.mean([text_mask(3, at_least_one=False, key=(i,)).size for i in range(4000)]) / 3
    # Standard errors are 0.003 and 0.004.
    assert abs(with_rule - (0.6 + 0.8**3) / 3) < 0.015 and abs(without - 0.2) < 0.016
    assert min(text_mask(3, key=(i,)).size for i in range(500)) == 1


def test_the_forced_token_is_chosen_evenly():
    chosen = np.bincount([text_mask(4, ratio=1e-9, key=(i,))[0] for i in range(4000)], minlength=5)[1:]
    # 1000 expected each, standard deviation 27.
    assert chosen.min() > 880 and chosen.max() < 1120


def test_nothing_eligible_masks_nothing():
    assert text_mask(0).size == 0


def test_row_zero_cannot_be_masked():
    with pytest.raises(ValueError, match="row 0"):
        corruption.draw_text_mask(
            np.array([0, 1]), ratio=0.5, at_least_one=True, generator=corruption.seeded_generator(1)
        )


def unit_noise(kind, count=3, key=("s",), step=(1, 0)):
    generator = corruption.seeded_generator(*key)
    sizes = dict(unit_dim=VISION.unit_dim, patch_dim=VISION.patch_dim)
    return corruption.draw_unit_noise(count, **sizes, kind=kind, generator=generator, step_key=step)


def test_kinds_of_noise():
    normal, shared = unit_noise("normal", 400), unit_noise("shared")
    # 86,400 standard-normal values: standard error of the mean 0.0034, of the deviation 0.0024.
    assert abs(normal.mean()) < 0.015 and abs(normal.std() - 1) < 0.01
    assert (shared == shared[0]).all() and shared.std() > 0.5
    assert (unit_noise("zero") == 0).all() and unit_noise("mean") is None
    with pytest.raises(ValueError, match="'grey'"):
        unit_noise("grey")


@pytest.mark.parametrize("kind", ["normal", "shared", "zero", "mean"])
def test_noise_from_seeds_is_what_the_source_of_the_mask_goes_on_with(kind):
    """Claim: drawn later, in another process, noise has the bits that one generator gives mask and noise in a row."""
    key, step = (5, 2, "row 7", "units"), (5, 64)
    generator = corruption.seeded_generator(*key)
    masked = corruption.draw_unit_mask(23, ratio=0.5, generator=generator)
    sizes = dict(unit_dim=VISION.unit_dim, patch_dim=VISION.patch_dim)
    wanted = corruption.draw_unit_noise(masked.size, **sizes, kind=kind, generator=generator, step_key=step)
    later = pickle.loads(pickle.dumps(corruption.UnitNoise(kind, key, 23, masked.size, step)))
    found = later.draw(**sizes)
    assert (found is None) == (wanted is None)
    if wanted is not None:
        np.testing.assert_array_equal(found, wanted)
    assert len(pickle.dumps(later)) < 400, "a few bytes cross, not the values"


def test_shared_noise_is_one_patch_per_global_batch():
    """Claim: every patch of every masked unit gets the same values, as MoCa writes one row over all masked rows."""
    patches = unit_noise("shared").reshape(-1, VISION.patch_dim)
    assert (patches == patches[0]).all() and (patches[0] != patches[0, 0]).any()
    same = unit_noise("shared", key=("s",)), unit_noise("shared", key=("t",))
    np.testing.assert_array_equal(*same)
    assert (unit_noise("shared", step=(1, 8)) != same[0]).any()


@pytest.mark.parametrize("kind", ["normal", "shared", "zero", "mean"])
def test_masked_units_are_replaced_and_everything_else_stays(kind):
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(5 * 4, VISION.patch_dim)).astype(np.float32)
    before, masked = pixels.copy(), np.array([1, 3])
    noise = unit_noise(kind, 2)
    corruption.replace_units(pixels, masked, noise, vision=VISION)
    units, old = pixels.reshape(5, -1), before.reshape(5, -1)
    np.testing.assert_array_equal(units[[0, 2, 4]], old[[0, 2, 4]])
    if kind != "mean":
        np.testing.assert_array_equal(units[masked], noise)
        return
    # A unit is 4 patches x 3 channels x 2 frames x 9 pixels: one mean per channel, by a plain loop.
    for unit in masked:
        for channel in range(3):
            expected = before[4 * unit : 4 * unit + 4, 18 * channel : 18 * channel + 18].mean()
            found = pixels[4 * unit : 4 * unit + 4, 18 * channel : 18 * channel + 18]
            # Two orders of summing 72 float32 numbers.
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_normalised_targets_have_zero_mean_and_unit_variance_per_patch():
    units = np.random.default_rng(0).normal(3, 5, size=(6, VISION.unit_dim)).astype(np.float32)
    patches = corruption.normalize_targets(units, vision=VISION).reshape(-1, VISION.patch_dim)
    # float32 rounding over 54 values.
    np.testing.assert_allclose(patches.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(patches.std(axis=1, ddof=1), 1, atol=1e-5)


def test_normalising_a_flat_patch_stays_finite():
    assert np.isfinite(corruption.normalize_targets(np.ones((1, VISION.unit_dim), np.float32), vision=VISION)).all()
