"""Linears that do not keep their input for the backward pass where it can be made again from what is kept anyway.

A norm keeps its input, an activation the projection before it, and attention over buckets of segments its outputs in
their order; the linear behind any of them would keep the result as well. Over a layer that is a third of all that
stays for the backward pass, and making it again costs a copy or two or three multiplications an element, nothing beside
the linear itself. The operations are those of the forward pass, so the gradient is the same bit for bit.

The same way a projection in front of an activation can be run again (``remakes_output``), which frees the activation's
input, too, at the cost of one product.

Megatron's selective recompute of ``layernorm`` does the same by emptying and refilling storages, in its Transformer
Engine layers' order of events alone, and knows no dense activation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

_RECIPE = "_megatron_cocoa_remake"


def remember(output: Tensor, remake: Callable[[], Tensor]) -> Tensor:
    """Let a linear that reads ``output`` keep ``remake`` in its place.

    Args:
        output: any tensor; the mark is lost on views and copies, which are then kept as usual.
        remake: gives the same values, without gradient; called once for each linear's backward. It should hold on to
            nothing that would not be kept anyway.
    """
    setattr(output, _RECIPE, remake)
    return output


def recipe_of(x: Tensor) -> Callable[[], Tensor] | None:
    """What was remembered of ``x``."""
    return getattr(x, _RECIPE, None)


def reshaped(x: Tensor, *shape: int) -> Tensor:
    """``x.reshape(*shape)``, which can be made again if ``x`` can."""
    result, remake = x.reshape(*shape), recipe_of(x)
    return result if remake is None else remember(result, lambda: remake().reshape(*shape))


@contextlib.contextmanager
def _keeping_recipe(x: Tensor) -> Iterator[None]:
    remake = recipe_of(x)
    if remake is None or not torch.is_grad_enabled():
        yield
        return
    pointer, shape = x.data_ptr(), x.shape

    def pack(saved: Tensor):
        return remake if saved.data_ptr() == pointer and saved.shape == shape else saved

    def unpack(kept):
        return kept if isinstance(kept, Tensor) else kept()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class RemadeColumnParallelLinear(ColumnParallelLinear):
    """Megatron's, whose input is made again for the weight's gradient; it adds a bias itself, and in place.

    Megatron and its callers would write output and bias to another tensor as wide as the ffn.

    remakes_output: let an activation that reads the output run this linear again instead of keeping it.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.remakes_output = False
        if self.gather_output and self.bias is not None:
            raise ValueError("this linear adds a bias to its own columns: for gather_output take ColumnParallelLinear")
        self.skip_bias_add = True

    def forward(self, input_: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
        with _keeping_recipe(input_):
            output, bias = super().forward(input_, *args, **kwargs)
        output = output if bias is None else output.add_(bias)
        if self.remakes_output and output.requires_grad:
            remake_input = recipe_of(input_) or input_.detach
            remember(output, torch.no_grad()(lambda: self.forward(remake_input(), *args, **kwargs)[0]))
        return output, None


class RemadeRowParallelLinear(RowParallelLinear):
    """Megatron's, whose input is made again for the weight's gradient."""

    def forward(self, input_: Tensor):
        with _keeping_recipe(input_):
            return super().forward(input_)
