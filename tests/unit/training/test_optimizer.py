"""What a stage's steps do to the weights, against torch's AdamW, its clipping, and transformers' schedules."""

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from megatron_cocoa.config import BridgeSettings, OptimizerSettings, ParallelSettings, TrainSettings
from megatron_cocoa.parallel import topology
from megatron_cocoa.training import spikes, trainer
from tests.unit.training.one_layer import Loader, layer, train_on, weights, wrapped_layer

STEPS = 8
ADAM = dict(betas=(0.8, 0.95), eps=1e-6)
OPTIMIZER = OptimizerSettings(weight_decay=0.1, clip_grad=0.5, adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-6)


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    topology.initialize(ParallelSettings(), topology.LaunchInfo(0, 1, 0), seed=0)
    yield
    topology.shutdown()


def loss_of(module: nn.Module, step: int) -> torch.Tensor:
    """One whose gradient norm lies above ``clip_grad`` in every other step, below it in the others."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    return module(x).square().mean() * (10.0 if step % 2 else 0.1)


def stage_trainer(monkeypatch, stage: BridgeSettings, optimizer: OptimizerSettings = OPTIMIZER, loss=loss_of):
    train_on(monkeypatch, loss)
    return trainer._StageTrainer(
        wrapped_layer(),
        None,
        Loader(),
        stage=stage,
        settings=TrainSettings(optimizer=optimizer, bridge=stage),
        keeping=None,
        meter=None,
    )


def by_torch(rates: list[float]) -> tuple[list[torch.Tensor], list[float]]:
    """Weights and gradient norms of a plain loop."""
    module, norms = layer(), []
    decayed = {"params": [module.weight], "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([decayed, {"params": [module.bias], "weight_decay": 0.0}], **ADAM)
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss_of(module, step).backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), 0.5)))
        optimizer.step()
    return [p.detach() for p in module.parameters()], norms


def transformers_rates(style: str, *, lr: float, warmup: int, steps: int) -> list[float]:
    """Of the updates 2 to ``steps + 1``: our stage is one update ahead, whose first is not taken at rate 0."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    name = "constant_with_warmup" if style == "constant" else style
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    rates = []
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    return rates


@pytest.mark.parametrize("style", ["linear", "cosine", "constant"])
def test_a_stage_is_adamw_with_clipping_at_the_scheduled_rates(monkeypatch, style):
    """Claim: each step takes its own rate, from the first to the last, clips by the global norm, and spares biases.

    1e-6 is float32 rounding over eight updates; a step of another rate, or one that is not clipped, shows at 1e-3.
    """
    stage = BridgeSettings(steps=STEPS, lr=1e-2, lr_warmup_steps=3, lr_decay_style=style)
    rates = transformers_rates(style, lr=1e-2, warmup=3, steps=STEPS)
    own = stage_trainer(monkeypatch, stage)
    metrics = [own.step() for _ in rates]
    wanted, norms = by_torch(rates)
    assert [line["lr"] for line in metrics] == pytest.approx(rates, rel=1e-9, abs=1e-15)
    assert [line["grad_norm"] for line in metrics] == pytest.approx(norms, rel=1e-4)
    assert min(norms) < OPTIMIZER.clip_grad < max(norms)
    for ours, theirs in zip(weights(own.model), wanted):
        assert (ours - theirs).abs().max() < 1e-6


@pytest.mark.parametrize("warmup, first", [(2, 5e-3), (STEPS, 1e-2 / 7), (0, 1e-2 - 9e-3 / STEPS)])
def test_the_last_step_is_taken_at_the_least_rate(monkeypatch, warmup, first):
    """Claim: whatever the warm-up, be it as long as the stage, rates end at ``min_lr`` after a peak at ``lr``."""
    stage = BridgeSettings(steps=STEPS, lr=1e-2, min_lr=1e-3, lr_warmup_steps=warmup)
    own = stage_trainer(monkeypatch, stage)
    rates = []
    for _ in range(STEPS):
        rates.append(own.step()["lr"])
        assert {group["lr"] for group in own.optimizer.param_groups} == {rates[-1]}
    assert rates[-1] == pytest.approx(1e-3) and rates[0] == pytest.approx(first)
    assert warmup == 0 or max(rates) == pytest.approx(1e-2)


def test_a_skipped_step_is_counted_and_forgotten(monkeypatch):
    """Claim: it moves no weight and is not judged by, takes its samples and its rate, and an applied step ends a row.

    Steps 4 and 5 are 100 times as large as the others and step 7 is NaN, after two norms to judge by.
    """
    monkeypatch.setattr(spikes, "LEAST_NORMS", 2)
    scale = {4: 100.0, 5: 100.0, 7: float("nan")}
    stage = BridgeSettings(steps=STEPS, lr=1e-2, lr_warmup_steps=0, global_batch_size=16)
    own = stage_trainer(
        monkeypatch,
        stage,
        OptimizerSettings(max_norm_ratio=10.0, max_skipped_steps=3),
        lambda module, step: module(torch.ones(1, 4)).sum() * scale.get(step, 1.0),
    )
    moved, rows, before = [], [], weights(own.model)
    for _ in range(STEPS):
        own.step()
        now = weights(own.model)
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, now)))
        rows.append(own.progress.skipped_in_a_row)
        before = now
    assert moved == [step not in scale for step in range(STEPS)]
    assert rows == [0, 0, 0, 0, 1, 2, 0, 1]
    progress = own.progress
    assert (progress.step, progress.skipped, progress.samples) == (STEPS, 3, 16 * STEPS)
    assert progress.recent_norms == [progress.recent_norms[0]] * 5
    assert 0 < progress.data_wait < progress.seconds


def test_a_run_ends_at_the_last_of_the_skipped_steps_it_allows(monkeypatch):
    """Claim: two skipped steps in a row are survived where three are too many, and the third is an error at once."""
    bad = {1, 2, 4, 5, 6}
    own = stage_trainer(
        monkeypatch,
        BridgeSettings(steps=STEPS, lr=1e-2, lr_warmup_steps=0),
        OptimizerSettings(max_skipped_steps=3),
        lambda module, step: module(torch.ones(1, 4)).sum() * (float("nan") if step in bad else 1.0),
    )
    for _ in range(6):
        own.step()
    message = r"3 steps in a row \(optimizer.max_skipped_steps\), up to step 7 were skipped"
    with pytest.raises(FloatingPointError, match=message):
        own.step()
