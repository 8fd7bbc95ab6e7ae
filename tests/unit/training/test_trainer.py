"""Parts of a step: what is not finite leaves the weights alone, and what ran twice counts."""

import math
from types import SimpleNamespace

import pytest

from megatron_cocoa.config import TrainSettings
from megatron_cocoa.model.workload import Workload
from megatron_cocoa.objectives import build_objective
from megatron_cocoa.training.trainer import _apply, _StageTrainer


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


def test_a_norm_above_the_limit_is_not_applied():
    """Claim: a finite gradient that stands out is left out as well and its norm told."""
    optimizer = Optimizer(2.5)
    assert _apply(optimizer, {"loss": 1.0}, 2.4) == (False, 2.5) and optimizer.steps == 0


def test_a_finite_step_is_applied_once():
    optimizer = Optimizer(2.5)
    assert _apply(optimizer, {"loss": 1.0}, 2.5) == (True, 2.5) and optimizer.steps == 1


@pytest.mark.parametrize(
    "stage, number, chunks, twice",
    [("contrastive", 4, 1, 0.75), ("contrastive", 1, 1, 0.0), ("contrastive", 4, 2, 1.0), ("bridge", 4, 1, 0.0)],
)
def test_forward_runs_of_gradient_caching_count_for_the_hardware(stage, number, chunks, twice):
    """Claim: all micro-batches but the last run forward twice, all if interleaved, and those of no other stage."""
    asked = {}
    trainer = SimpleNamespace(
        meter=SimpleNamespace(metrics=lambda workload, **options: asked.update(options)),
        objective=build_objective(stage, TrainSettings()),
        model=SimpleNamespace(chunks=[None] * chunks),
        stage=TrainSettings().stage(stage),
    )
    _StageTrainer._speed(trainer, Workload(), 1.0, num_microbatches=number)
    assert asked["extra_forward_passes"] == twice
