"""A model of one linear layer, so that a stage's loop can be followed step by step beside a plain one of torch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_cocoa.config import ParallelSettings
from megatron_cocoa.model.build import Model
from megatron_cocoa.model.workload import Workload
from megatron_cocoa.training import trainer
from megatron_cocoa.training.data_parallel import wrap_data_parallel

Loss = Callable[[nn.Module, int], Tensor]
"""Of the layer and the number of the step, from 0."""


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def wrapped_layer() -> Model:
    """``layer`` as the model of a stage; on a world of one rank."""
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    return wrap_data_parallel(Model([layer()], config, SimpleNamespace(vision=None)), ParallelSettings())


def weights(model: Model) -> list[Tensor]:
    return [p.detach().clone() for p in model.chunks[0].parameters()]


class Loader:
    """Its only micro-batch is the number of the step."""

    def __init__(self) -> None:
        self.position = 0

    def next_step(self) -> list[int]:
        self.position += 1
        return [self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def train_on(monkeypatch, loss: Loss) -> list[int]:
    """Let the trainer take ``loss``; the steps, counted from 1, in which costly metrics are asked for, as they come."""
    detailed_steps: list[int] = []

    def forward_backward(model, objective, batches, *, detailed):
        (step,) = batches
        if detailed:
            detailed_steps.append(step + 1)
        value = loss(model.chunks[0], step)
        value.backward()
        model.chunks[0].finish_grad_sync()
        return {"loss": float(value)}

    monkeypatch.setattr(trainer, "forward_backward", forward_backward)
    monkeypatch.setattr(trainer._StageTrainer, "_whole_step", lambda *_: (Workload(), 0))
    monkeypatch.setattr(trainer, "_why_skipped", lambda *_: "skipped")
    return detailed_steps
