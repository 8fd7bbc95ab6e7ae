"""The MLPs' activations with a backward of their own: SwiGLU, and the quick GELU of Qwen2-VL's tower.

Autograd's versions keep up to five tensors of the ffn's width; these keep their input alone, from which a linear that
follows makes its own input again (``remade``). Megatron's MLP takes a plain activation as a function; SwiGLU plugs in
where it takes a Transformer Engine module (``use_te_activation_func``), which is a slot for any module.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_cocoa.model.remade import remember

BLOCK_ELEMENTS = 2**18
"""Of a backward pass that are worked on together on a CPU: what lies between stays in its caches, and there is enough
for all threads and for the calls to cost nothing beside it."""

QUICK_GELU_SCALE = 1.702


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _quick_gelu(x: Tensor) -> Tensor:
    return torch.sigmoid(x * QUICK_GELU_SCALE).mul_(x)


def _swiglu_backward(x: Tensor, grad: Tensor, out: Tensor) -> None:
    gate, up = x.chunk(2, dim=-1)
    gate_grad, up_grad = out.chunk(2, dim=-1)
    torch.ops.aten.silu.out(gate, out=up_grad).mul_(grad)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)


def _quick_gelu_backward(x: Tensor, grad: Tensor, out: Tensor) -> None:
    """With ``s`` the sigmoid and ``y = x s``: ``s (1 + 1.702 (x - y))``."""
    sigmoid = torch.sigmoid(x * QUICK_GELU_SCALE)
    torch.addcmul(x, x, sigmoid, value=-1, out=out)
    out.mul_(QUICK_GELU_SCALE).add_(1).mul_(sigmoid).mul_(grad)


class _Lean(torch.autograd.Function):
    """An activation that keeps its input, and whose backward works through it block by block."""

    @staticmethod
    def forward(ctx, x: Tensor, function: Callable, backward: Callable) -> Tensor:
        ctx.save_for_backward(x)
        ctx.differentiate = backward
        return function(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        rows = max(1, BLOCK_ELEMENTS // x[0].numel() if x.device.type == "cpu" and len(x) else len(x))
        for parts in zip(x.split(rows), grad.split(rows), out.split(rows)):
            ctx.differentiate(*parts)
        return out, None, None


def _lean(x: Tensor, function: Callable, backward: Callable) -> Tensor:
    return remember(_Lean.apply(x, function, backward), torch.no_grad()(lambda: function(x)))


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)``, the activation of Qwen2-VL's tower; any shape."""
    return _lean(x, _quick_gelu, _quick_gelu_backward)


class SwiGLU(MegatronModule):
    """``silu(gate) * up`` (arXiv 2002.05202) of ``(tokens, 1, 2 * ffn_local)`` laid out ``[gate, up]``."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config=config)

    def forward(self, x: Tensor) -> Tensor:
        return _lean(x, _swiglu, _swiglu_backward)
