"""Which gradient norm stands out from those before it."""

import math

from megatron_cocoa.training.progress import Progress
from megatron_cocoa.training.spikes import LEAST_NORMS, NUM_NORMS, highest_norm, remember


def test_a_norm_is_judged_by_the_median_of_the_last_ones():
    """Claim: one outlier among them moves nothing, older ones are forgotten, and few or no ratio allow every norm."""
    recent: list[float] = []
    for norm in [*[50.0] * NUM_NORMS, *[2.0] * (NUM_NORMS - 1), 1000.0]:
        remember(recent, norm)
    assert len(recent) == NUM_NORMS and highest_norm(recent, 10.0) == 20.0 == highest_norm(recent[:LEAST_NORMS], 10.0)
    assert highest_norm(recent, None) == math.inf == highest_norm(recent[: LEAST_NORMS - 1], 10.0)


def test_what_is_remembered_is_part_of_a_checkpoint():
    """Claim: a resumed run judges its first steps as the unbroken one does; checkpoints without norms are read."""
    progress = Progress(step=3, recent_norms=[0.1, 1 / 3, 2.0])
    assert Progress.from_dict(progress.as_dict()) == progress
    assert Progress.from_dict({"step": 3}).recent_norms == []
