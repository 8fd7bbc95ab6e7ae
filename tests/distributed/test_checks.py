"""Collectives and context-parallel attention on real ranks (gloo on CPU)."""

import pytest

from tests.distributed import collectives, mask_kinds
from tests.distributed.launch import result_of


@pytest.mark.parametrize("check", collectives.CHECKS)
def test_own_collectives_and_their_gradients(request, check):
    """Claim: each exchange moves the rows that it says, and its backward is the gradient of what it does."""
    result_of(request, check)


@pytest.mark.parametrize("check", mask_kinds.CHECKS)
def test_every_mask_kind_at_every_context_parallel_degree(request, check):
    """Claim: attention over a sharded sequence is the dense attention of the mask kind's definition.

    Random packs whose blocks A or B may be empty, with a tail. Sums of at most 60 float32 terms of size one are
    good to about 1e-6; a wrong row would show at 1e-1.
    """
    errors = result_of(request, check)
    assert errors["output"] < 1e-5 and errors["gradient"] < 1e-5, errors
