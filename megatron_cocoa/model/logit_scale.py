"""The learned temperature of contrastive learning, as CLIP has it (Radford et al., arXiv 2103.00020).

The parameter is log(1 / temperature) and lives on the last pipeline stage, beside the heads: objectives hold no
parameters, and here Megatron's DDP, optimizers and checkpoints treat it like any other replicated one. It has no
Hugging Face name and stays out of exports. CLIP clips the parameter after each update; under Megatron's optimizers the
value to clip would be the master weight, which may be sharded, so the bounds are applied where it is read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron_cocoa.config import TEMPERATURE_RANGE


def new_logit_scale(temperature: float) -> nn.Parameter:
    """The parameter, float32 in any model, starting at log(1 / ``temperature``).

    Its shape is ``(1,)``: Megatron exempts vectors from weight decay.
    """
    return nn.Parameter(torch.full((1,), -math.log(temperature), dtype=torch.float32))


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,), (low, high) = ctx.saved_tensors, ctx.bounds
        # Descent moves against the gradient: a value out of bounds may come back, but not go further.
        outward = ((x >= high) & (grad < 0)) | ((x <= low) & (grad > 0))
        return grad.masked_fill(outward, 0.0), None, None


def bounded_logit_scale(parameter: Tensor) -> Tensor:
    """The scale as a float32 scalar within the bounds of ``TEMPERATURE_RANGE``.

    The gradient passes through unchanged, except that a parameter at or beyond a bound is not pushed further out.
    """
    coldest, warmest = TEMPERATURE_RANGE
    return _Bounded.apply(parameter, -math.log(warmest), -math.log(coldest)).squeeze(0)
