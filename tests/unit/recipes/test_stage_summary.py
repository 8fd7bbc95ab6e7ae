"""What a stage's summary tells of all replicas."""

from megatron_cocoa.recipes.stage_summary import merged


def test_what_any_replica_skipped_is_in_the_sum():
    """Claim: counts are those of the run, with reasons that the first replica has not met; ratios are means."""
    alike = {"rows": 78, "dropped/caption_missing": 2}
    first = {**alike, "samples": 24, "cut_tokens": 5, "skipped/bad": 1, "text_mask_ratio": 0.25}
    skipped = {"skipped/missing_picture": 3, "skipped/bad": 4}
    second = {**alike, **skipped, "samples": 24, "cut_tokens": 2, "text_mask_ratio": 0.75}
    counts = {"samples": 48, "cut_tokens": 7, "skipped/bad": 5, "skipped/missing_picture": 3}
    assert merged([first, second]) == {**alike, **counts, "text_mask_ratio": 0.5}
    assert merged([first]) == first
