"""A step that one rank's data have spoiled is skipped on all ranks together, counted, and in the end named."""

import re

import pytest

from tests.distributed.faults import ALONE, ALWAYS, IN_A_ROW, MISREAD, ONCE, OUTLIERS, STEPS
from tests.distributed.launch import result_of


def why_the_third_was_skipped(found: dict) -> str:
    """The reason that every rank gives, after a look at what was applied: all steps but the third, counted once."""
    for changed, skipped in zip(found["changed"], found["skipped"]):
        assert changed == [step != 3 for step in range(1, STEPS + 1)]
        assert skipped == [0, 0, 1, 1, 1, 1]
    ((reason,),) = {tuple(reasons) for reasons in found["reasons"]}
    return reason


@pytest.mark.parametrize("check", ONCE)
def test_a_nan_pixel_costs_one_step_on_all_ranks(request, check):
    """Claim: no rank's weights move in the third step, all move in the others, and it is counted once."""
    reason = why_the_third_was_skipped(result_of(request, check))
    assert reason.startswith("step 3: loss or gradient is not finite (loss nan,")


@pytest.mark.parametrize("check", OUTLIERS)
def test_a_gradient_that_stands_out_costs_one_step_on_all_ranks(request, check):
    """Claim: as a NaN does, and the reason gives the norm, the limit and the samples, the same on every rank."""
    reason = why_the_third_was_skipped(result_of(request, check))
    norm, limit = re.match(r"step 3: gradient norm ([\d.e+]+) is above ([\d.e+]+), optimizer", reason).groups()
    assert float(norm) > float(limit) > 1 and len(reason.rpartition("samples of this step: ")[2].split(", ")) == 8


@pytest.mark.parametrize("check", ALWAYS)
def test_spoiled_steps_in_a_row_end_the_run_with_the_samples_named(request, check):
    """Claim: after the set number every rank raises the same message, with samples of the rank that had them."""
    found = result_of(request, check)
    assert all(len(changed) == IN_A_ROW for changed in found["changed"])
    assert len(set(found["messages"])) == 1
    message = found["messages"][0]
    assert f"{IN_A_ROW} steps in a row (optimizer.max_skipped_steps), up to step {IN_A_ROW + 1} were skipped" in message
    # A step has eight samples, named in the message whichever rank holds them.
    assert len(message.rpartition("samples of this step: ")[2].split(", ")) == 8


@pytest.mark.parametrize("check", MISREAD)
def test_ranks_that_plan_a_step_in_different_ways_all_end_the_run(request, check):
    """Claim: one replica's read error does not shift samples between ranks unseen; every rank says so, in that step."""
    found = result_of(request, check)
    (message,), (steps,) = set(found["messages"]), set(found["steps"])
    if "nobody" in check:
        assert (message, steps) == ("", STEPS)
    else:
        assert steps == 2 and "the data-parallel ranks do not agree on the samples of step 3" in message


@pytest.mark.parametrize("check", ALONE)
def test_a_fault_of_the_first_rank_alone_ends_all_ranks_with_its_message(request, check):
    """Claim: where one rank looks or writes for all, the others do not wait for it in their next exchange."""
    (message,) = set(result_of(request, check)["messages"])
    assert re.search(ALONE[check][1], message)
