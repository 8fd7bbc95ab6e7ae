"""A run notices that it has to stop."""

import os
import signal

import pytest

from megatron_cocoa.config import ParallelSettings
from megatron_cocoa.parallel import topology
from megatron_cocoa.parallel.stop_signals import STOP_SIGNALS
from megatron_cocoa.training.stopping import StopWatch


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    topology.initialize(ParallelSettings(), topology.LaunchInfo(0, 1, 0), seed=0)
    yield
    topology.shutdown()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_reported_at_the_next_question(number):
    """Claim: the process survives the signal, finishes its step and learns why to stop; handlers are given back."""
    before = signal.getsignal(number)
    with StopWatch() as stop:
        assert stop.reason() is None
        os.kill(os.getpid(), number)
        assert stop.reason() == f"signal {signal.Signals(number).name}"
    assert signal.getsignal(number) == before


def test_the_time_budget_counts_what_was_spent_before():
    """Claim: an hour is over after 3600 seconds, and not before."""
    with StopWatch(budget_minutes=60, spent_seconds=3500) as stop:
        assert stop.reason() is None
    with StopWatch(budget_minutes=60, spent_seconds=3600) as stop:
        assert "time_budget_minutes" in stop.reason()


def test_a_failure_is_raised_where_all_ranks_ask():
    """Claim: what one rank cannot go on from is an error of all, at the end of the step."""
    with StopWatch() as stop:
        stop.fail("the log cannot be written")
        with pytest.raises(ValueError, match="the log cannot be written"):
            stop.reason()
