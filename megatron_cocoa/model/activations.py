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


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        gate_grad, up_grad = out.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
        torch.mul(F.silu(gate), grad, out=up_grad)
        return out


class SwiGLU(MegatronModule):
    """``silu(gate) * up`` (arXiv 2002.05202) of ``(tokens, 1, 2 * ffn_local)`` laid out ``[gate, up]``."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config=config)

    def forward(self, x: Tensor) -> Tensor:
        return _SwiGLU.apply(x)
