"""A step whose loss or gradient is not finite leaves the weights alone."""

import math

import pytest

from megatron_cocoa.training.trainer import _apply


class Optimizer:
    """Megatron's interface, with a gradient norm of our choice."""

    def __init__(self, norm: float):
        self.norm, self.steps, self.prepared = norm, 0, 0

    def prepare_grads(self) -> bool:
        self.prepared += 1
        return False

    def get_grad_norm(self) -> float:
        assert self.prepared, "the norm is of the prepared gradients"
        return self.norm

    def step(self):
        self.steps += 1
        return True, self.norm, None


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_not_applied(norm):
    """Claim: clipping would turn it into NaN weights, so the step is skipped, although the loss is finite."""
    optimizer = Optimizer(norm)
    applied, _ = _apply(optimizer, {"loss": 1.0}, math.inf)
    assert not applied and optimizer.steps == 0


def test_a_loss_that_is_not_finite_is_not_applied():
    """Claim: the same, before any gradient is looked at."""
    optimizer = Optimizer(1.0)
    assert _apply(optimizer, {"loss": math.nan}, math.inf)[0] is False and optimizer.steps == 0


def test_a_finite_step_is_applied_once():
    optimizer = Optimizer(2.5)
    assert _apply(optimizer, {"loss": 1.0}, 2.5) == (True, 2.5) and optimizer.steps == 1
