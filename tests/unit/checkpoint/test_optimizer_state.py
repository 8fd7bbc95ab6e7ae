"""The distributed optimizer's state is put where Megatron will look for it."""

import torch

from megatron_cocoa.checkpoint.optimizer_state import spread_buckets


def test_buckets_stand_at_their_own_offsets():
    """Claim: what was gathered without gaps is found at the offsets that count the padding between buckets."""
    spread = spread_buckets(torch.arange(1.0, 8.0), [(0, 3), (4, 2), (8, 2)], size=12)
    assert spread.tolist() == [1, 2, 3, 0, 4, 5, 0, 0, 6, 7, 0, 0]


def test_one_bucket_stays_as_it_is():
    assert spread_buckets(torch.arange(5.0), [(0, 5)], size=8).tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
