"""Running a model in FP32 whose layers stay in memory in the dtype that their weights have on disk.

A cast from BF16 to FP32 changes no value: a layer that is cast when its turn comes gives the same bits as a model that
is FP32 as a whole, which takes twice the memory. What lies outside of the layers is FP32 throughout: there
Hugging Face's models look for the dtype to cast their inputs to.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def held_dtype(on_disk: set[torch.dtype]) -> torch.dtype:
    """The dtype to hold a model's layers in, of weights in these: theirs if they share one that FP32 contains."""
    return next(iter(on_disk)) if on_disk in ({torch.bfloat16}, {torch.float16}) else torch.float32


def run_in_fp32(model: nn.Module, layers: Iterable[nn.Module], *, round_to: torch.dtype | None = None) -> None:
    """Cast the parameters of ``model`` to FP32: those of each of ``layers`` while it runs, the others for good.

    Args:
        model: of parameters in any dtype.
        layers: parts of it, which nothing reads but their own forward pass.
        round_to: round all parameters to this dtype first.
    """
    scratch: dict[tuple, Tensor] = {}
    within = set()
    for layer in layers:
        within.update(layer.parameters())
        hooks = _CastWhileItRuns(layer, round_to, scratch)
        layer.register_forward_pre_hook(hooks.begin)
        layer.register_forward_hook(hooks.end)
    for parameter in model.parameters():
        if parameter not in within:
            parameter.data = _rounded(parameter.data, round_to).float()


class _CastWhileItRuns:
    """A layer's hooks.

    Args:
        layer: whose parameters are cast.
        round_to: as in ``run_in_fp32``.
        scratch: where the FP32 values go, which layers of one shape share: fresh memory takes as long as the cast.
    """

    def __init__(self, layer: nn.Module, round_to: torch.dtype | None, scratch: dict[tuple, Tensor]) -> None:
        self.parameters, self.round_to, self.scratch = list(layer.parameters()), round_to, scratch
        self.held: list[Tensor] = []

    def begin(self, *_: object) -> None:
        self.held = [parameter.data for parameter in self.parameters]
        for place, (parameter, values) in enumerate(zip(self.parameters, self.held, strict=True)):
            values = _rounded(values, self.round_to)
            if values.dtype != torch.float32:
                key = place, values.shape
                if key not in self.scratch:
                    self.scratch[key] = torch.empty_like(values, dtype=torch.float32)
                values = self.scratch[key].copy_(values)
            parameter.data = values

    def end(self, *_: object) -> None:
        for parameter, values in zip(self.parameters, self.held, strict=True):
            parameter.data = values
        self.held = []


def _rounded(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    return values if dtype is None else values.to(dtype)
