"""Activations: SwiGLU and the quick GELU of Qwen2-VL's tower with a backward pass of their own, and the merger's GELU.

Autograd's versions keep up to five tensors of the ffn's width. These keep only their input, from which the linear
that follows remakes its own input (``remade.py``), and on a CPU they write the gradient over it. Megatron's MLP takes
a plain activation as a function. SwiGLU is a module and goes where Megatron expects one of Transformer Engine's
(``use_te_activation_func``), a place that accepts any module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_cocoa.model.compiled import compiled_on_gpu
from megatron_cocoa.model.remade import recipe_of, remember
from megatron_cocoa.parallel.device import is_on_gpu

BLOCK_ELEMENTS = 2**18
"""Elements per block of a backward pass on a CPU: few enough for intermediate results to stay in its caches, and enough
to keep all threads busy and to hide the cost of the calls."""

QUICK_GELU_SCALE = 1.702


@dataclass(frozen=True)
class _Formula:
    """An element-wise function and its derivative in two forms.

    backward: ``(x, grad)``, over ``x``, in few passes over memory: for blocks on a CPU.
    gradient: ``(x, grad)``, by one kernel: for a GPU.
    """

    function: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], None]
    gradient: Callable[[Tensor, Tensor], Tensor]


def _swiglu(x: Tensor) -> Tensor:
    if is_on_gpu(x):
        from megatron_cocoa.model import kernels

        return kernels.swiglu(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_backward(x: Tensor, grad: Tensor) -> None:
    gate, up = x.chunk(2, dim=-1)
    outer = grad * up
    torch.ops.aten.silu.out(gate, out=up).mul_(grad)
    torch.ops.aten.silu_backward.grad_input(outer, gate, grad_input=gate)


def _swiglu_gradient(x: Tensor, grad: Tensor) -> Tensor:
    from megatron_cocoa.model import kernels

    return kernels.swiglu_gradient(x, grad)


@compiled_on_gpu
def _quick_gelu(x: Tensor) -> Tensor:
    return torch.sigmoid(x * QUICK_GELU_SCALE).mul_(x)


def _quick_gelu_backward(x: Tensor, grad: Tensor) -> None:
    """With ``s`` the sigmoid and ``y = x s``: ``s (1 + 1.702 (x - y))``."""
    sigmoid = torch.sigmoid(x * QUICK_GELU_SCALE)
    torch.addcmul(x, x, sigmoid, value=-1, out=x)
    x.mul_(QUICK_GELU_SCALE).add_(1).mul_(sigmoid).mul_(grad)


@compiled_on_gpu
def _quick_gelu_gradient(x: Tensor, grad: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x.float() * QUICK_GELU_SCALE)
    return (grad * sigmoid * (1 + QUICK_GELU_SCALE * x * (1 - sigmoid))).to(x.dtype)


SWIGLU = _Formula(_swiglu, _swiglu_backward, _swiglu_gradient)
QUICK_GELU = _Formula(_quick_gelu, _quick_gelu_backward, _quick_gelu_gradient)


class _RecomputedInput:
    """An activation's input, recomputed once for both readers: the linear after it, and its own backward pass."""

    def __init__(self, remake: Callable[[], Tensor]) -> None:
        self._remake, self._made = remake, None

    def get(self) -> Tensor:
        if self._remake is None:
            raise RuntimeError("a second backward pass through an activation whose input was recomputed for the first")
        if self._made is None:
            with torch.no_grad():
                self._made = self._remake()
        return self._made

    def pop(self) -> Tensor:
        """``get`` for the last time: frees the tensor, since autograd keeps this node to the end of the pass."""
        made = self.get()
        self._remake = self._made = None
        return made


class _Lean(torch.autograd.Function):
    """An activation that keeps only its input, or nothing if that is recomputed.

    On a CPU the backward pass works block by block and writes the gradient over the input. That is safe, because the
    linear after the activation has used the input already, and the one before does not need its own output. A second
    backward pass through the same graph is refused (by autograd's version check if the input was saved).
    """

    @staticmethod
    def forward(ctx, x: Tensor, formula: _Formula, recomputed: _RecomputedInput | None) -> Tensor:
        if recomputed is None:
            ctx.save_for_backward(x)
        ctx.formula, ctx.recomputed = formula, recomputed
        return formula.function(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x = ctx.saved_tensors[0] if ctx.recomputed is None else ctx.recomputed.pop()
        if is_on_gpu(x):
            return ctx.formula.gradient(x, grad), None, None
        rows = max(1, BLOCK_ELEMENTS // x[0].numel() if len(x) else 1)
        for parts in zip(x.split(rows), grad.split(rows)):
            ctx.formula.backward(*parts)
        return x, None, None


def _lean(x: Tensor, formula: _Formula) -> Tensor:
    remake = recipe_of(x)
    recomputed = None if remake is None else _RecomputedInput(remake)
    source = (lambda: x) if recomputed is None else recomputed.get
    return remember(_Lean.apply(x, formula, recomputed), lambda: formula.function(source()))


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)``, the activation of Qwen2-VL's tower; any shape."""
    return _lean(x, QUICK_GELU)


def gelu(x: Tensor) -> Tensor:
    """GELU (arXiv 1606.08415) by the error function, the merger's activation; any shape."""
    return remember(F.gelu(x), lambda: F.gelu(x))


class SwiGLU(MegatronModule):
    """``silu(gate) * up`` (arXiv 2002.05202) of ``(tokens, 1, 2 * ffn_local)`` laid out ``[gate, up]``.

    Without gradients the result is written over ``gate``: nothing else reads the projection before it.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config=config)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or is_on_gpu(x):
            return _lean(x, SWIGLU)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate, inplace=True).mul_(up)
