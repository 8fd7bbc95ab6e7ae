"""One bit that one rank has otherwise is seen in sums over all ranks."""

import pytest
import torch

from megatron_cocoa.training.agreement import all_equal, powers


@pytest.mark.parametrize(
    "digests",
    [[0] * 3, [2**63 - 1] * 2048, [5], [1, 2, 3], [2**21, 1], *([2**62, 2**62, 2**62 ^ 2**bit] for bit in range(63))],
)
def test_sums_over_ranks_tell_whether_all_have_the_same_digest(digests):
    """Claim: the sums that a step takes anyway show a single bit that one rank has otherwise, without overflow."""
    sums = torch.tensor([powers(digest) for digest in digests], dtype=torch.int64).sum(0).tolist()
    assert all_equal(sums, len(digests)) == (len(set(digests)) == 1)
