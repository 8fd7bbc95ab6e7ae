"""SwiGLU with a backward of its own.

Autograd's version splits, multiplies and concatenates, and keeps five tensors of the ffn's width; this one keeps
its input alone and writes both halves of the gradient into one buffer. It plugs in where Megatron's MLP takes a
Transformer Engine activation module (``use_te_activation_func``), which is a slot for any module.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_cocoa.model.remade import remember

ROWS_PER_BLOCK = 64
"""Rows of the backward pass that are worked on together on a CPU, so that what is between stays in its cache."""


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _swiglu(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        rows = ROWS_PER_BLOCK if x.device.type == "cpu" else max(1, x.shape[0])
        for x_block, grad_block, out_block in zip(x.split(rows), grad.split(rows), out.split(rows)):
            gate, up = x_block.chunk(2, dim=-1)
            gate_grad, up_grad = out_block.chunk(2, dim=-1)
            torch.ops.aten.silu.out(gate, out=up_grad).mul_(grad_block)
            torch.ops.aten.silu_backward.grad_input(grad_block * up, gate, grad_input=gate_grad)
        return out


class SwiGLU(MegatronModule):
    """``silu(gate) * up`` (arXiv 2002.05202) of ``(tokens, 1, 2 * ffn_local)`` laid out ``[gate, up]``."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config=config)

    def forward(self, x: Tensor) -> Tensor:
        return remember(_SwiGLU.apply(x), torch.no_grad()(lambda: _swiglu(x)))
