"""RMSNorm and LayerNorm whose parameters know sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_cocoa.model.remade import remember


class _RMSNorm(torch.autograd.Function):
    """RMSNorm (arXiv 1910.07467) in FP32, for the CPU.

    There torch's own consists of seven operations forward and about twenty backward. This one takes three and eight
    passes, and keeps the input and one number per row. On a GPU torch's own is one kernel each way.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, inverse = ctx.saved_tensors
        wide, grad, scale = x.float(), grad.float(), weight.float()
        normalized = wide * inverse
        product = grad * normalized
        weight_grad = product.sum(tuple(range(x.dim() - 1))).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, weight_grad, None
        along = (product @ scale).div_(-x.shape[-1]).unsqueeze(-1)
        input_grad = torch.mul(grad, scale, out=product).addcmul_(normalized, along).mul_(inverse)
        return input_grad.to(x.dtype), weight_grad, None


class Norm(nn.Module):
    """RMSNorm or LayerNorm by ``config.normalization``.

    Megatron's torch norm refuses sequence parallelism; under it each rank sees part of the rows, and the mark
    on the parameters makes Megatron sum their gradients over tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """``(..., hidden_size)``, normalised along the last axis; marked, so that linears need not keep it."""
        return remember(self._normalize(x), lambda: self._normalize(x))

    def _normalize(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        if x.device.type == "cpu":
            return _RMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
