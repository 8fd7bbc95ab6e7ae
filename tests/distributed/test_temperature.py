"""The learned temperature on real ranks."""

import pytest

from tests.distributed.launch import result_of, some_slow
from tests.distributed.temperature import LAYOUTS, OTHER

SLOW = {"temperature-pp2", "temperature-cp2"}
"""Their gradients are compared by default, with those of every other parameter."""


@pytest.mark.parametrize("check", some_slow(LAYOUTS, SLOW))
def test_one_temperature_is_learned_at_every_layout_and_kept_by_checkpoints(request, check):
    """Claim: all ranks hold the single process's value, a checkpoint brings it to another layout to the last bit.

    A checkpoint without it leaves the start value, and a model that learns none ignores it. Three AdamW steps move
    the value by 1e-3 of itself; Adam divides gradients by their size, so their rounding of 1e-6 moves it by 1e-9.
    """
    single, found = result_of(request, "temperature-single"), result_of(request, check)
    assert abs(found["value"] / found["start"] - 1) > 1e-4, "it must move, or nothing is compared"
    assert found["spread"] == 0.0
    assert found["value"] == pytest.approx(single["value"], rel=1e-6)
    if LAYOUTS[check][-1]:
        assert found["loaded"] == found["value"] and found["kept"] == pytest.approx(OTHER) and found["left_out"] == 1.0
