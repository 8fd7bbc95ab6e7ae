"""When a stage measures, saves and stops, and which random numbers its steps see."""

from types import SimpleNamespace

import pytest
import torch

from megatron_cocoa.checkpoint.info import CheckpointInfo
from megatron_cocoa.config import BridgeSettings, ParallelSettings, TrainSettings
from megatron_cocoa.parallel import topology
from megatron_cocoa.training.trainer import StageKeeping, train_stage
from tests.unit.training.one_layer import Loader, train_on, wrapped_layer

STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    topology.initialize(ParallelSettings(), topology.LaunchInfo(0, 1, 0), seed=0)
    yield
    topology.shutdown()


class Checkpoints:
    """Keeps what a checkpoint would say, and the steps of all of them in order."""

    def __init__(self) -> None:
        self.saved: dict[int, CheckpointInfo] = {}
        self.best: list[int] = []
        self.pending: list[int] = []

    def save(self, model, optimizer, info: CheckpointInfo) -> None:
        self.saved[info.step] = info
        self.pending.append(info.step)

    def save_best(self, model, info: CheckpointInfo) -> None:
        self.best.append(info.step)

    def load(self, step: int, model, optimizer) -> CheckpointInfo:
        return self.saved[step]

    def poll(self) -> None:
        pass

    def wait(self) -> None:
        self.pending.clear()


class Validation:
    """Finds the given values, one after the other, of a model that is left in evaluation mode."""

    interval, metric = 2, "recall"

    def __init__(self, values: list[float]) -> None:
        self.values = iter(values)

    def measure(self, model) -> dict[str, float]:
        model.train(False)
        return {"recall": next(self.values)}


class Run:
    """One stage on a model of one layer, which may be stopped and go on, and what it told its log."""

    def __init__(self, monkeypatch, **settings) -> None:
        self.checkpoints = Checkpoints()
        self.batches: list[int] = []
        self.steps: list[int] = []
        self.rates: list[float] = []
        self.validated: list[int] = []
        self.draws: list[float] = []
        self.settings = TrainSettings(bridge=BridgeSettings(steps=STEPS, lr_warmup_steps=0), **settings)
        self.detailed = train_on(monkeypatch, self._loss)

    def _loss(self, module, step: int) -> torch.Tensor:
        assert all(part.training for part in module.modules())
        self.batches.append(step)
        self.draws.append(float(torch.rand(())))
        return module(torch.ones(1, 4)).sum()

    def _log_step(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(step)
        self.rates.append(metrics["lr"])

    def go_on(self, *, from_step=None, stop_after=None, save_interval=None, values=()):
        asked = iter(range(from_step or 0, STEPS))
        stop = SimpleNamespace(reason=lambda: "a signal" if next(asked) + 1 == stop_after else None)
        keeping = StageKeeping(
            self.checkpoints, CheckpointInfo("bridge", 0, 0, 0, {}), save_interval, resume_step=from_step, stop=stop
        )
        return train_stage(
            wrapped_layer(),
            None,
            Loader(),
            stage=self.settings.bridge,
            settings=self.settings,
            log=SimpleNamespace(
                step=self._log_step,
                validation=lambda step, metrics: self.validated.append(step),
            ),
            keeping=keeping,
            validation=Validation(values) if values else None,
        )


def test_the_best_weights_are_kept_and_training_goes_on(monkeypatch):
    """Claim: the weights of the first of equal values are kept, and a step trains again after each measurement."""
    run = Run(monkeypatch)
    progress = run.go_on(values=[0.3, 0.5, 0.5, 0.4]).progress
    assert run.validated == [2, 4, 6, 8] and run.checkpoints.best == [2, 4]
    assert (progress.best_value, progress.best_step, progress.validated) == (0.5, 4, 8)


def test_a_stop_puts_the_measurement_off_and_saves(monkeypatch):
    """Claim: a step that a stop came upon is measured by the process that goes on, and no step is measured twice."""
    run = Run(monkeypatch)
    stopped = run.go_on(stop_after=4, values=[0.3])
    assert stopped.stopped == "a signal" and run.validated == [2] and list(run.checkpoints.saved) == [4]
    assert not run.checkpoints.pending, "what is written in the background is waited for"
    run.go_on(from_step=4, stop_after=5, values=[0.2])
    run.go_on(from_step=5, values=[0.4, 0.1])
    assert run.steps == list(range(1, STEPS + 1)) and run.batches == list(range(STEPS))
    assert run.validated == [2, 4, 6, 8] and run.checkpoints.best == [2, 6]


def test_checkpoints_are_written_on_the_way_alone(monkeypatch):
    """Claim: every ``save_interval`` steps and where the run stops; a stop after the last step is none, nor is one due
    there: its weights are handed over."""
    run = Run(monkeypatch)
    assert run.go_on(save_interval=4, stop_after=STEPS).stopped is None
    assert list(run.checkpoints.saved) == [4] and run.checkpoints.saved[4].loader == {"position": 4}
    assert not run.checkpoints.pending


def test_costly_metrics_are_taken_every_log_interval(monkeypatch):
    run = Run(monkeypatch, log_interval=3)
    run.go_on()
    assert run.detailed == [3, 6]


def test_random_numbers_and_rates_follow_from_the_step(monkeypatch):
    """Claim: dropout is another in each step and with another seed; both are the same in a run that was stopped."""
    through, stopped, other = Run(monkeypatch), Run(monkeypatch), Run(monkeypatch, seed=1)
    for run in (through, stopped, other):
        train_on(monkeypatch, run._loss)
        if run is stopped:
            run.go_on(stop_after=5)
            torch.rand(7)
        run.go_on(from_step=5 if run is stopped else None)
    assert through.draws == stopped.draws and len(set(through.draws)) == STEPS
    assert through.rates == stopped.rates and len(set(through.rates)) == STEPS
    assert not set(through.draws) & set(other.draws)
