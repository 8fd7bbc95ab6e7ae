"""Linears that do not keep their input for the backward pass if it can be recomputed from tensors that are kept anyway.

A norm keeps its input, an activation the output of the projection before it, and attention over buckets of segments
its outputs in the buckets' order. The linear that follows one of them would keep the result a second time. Over a
layer these are a third of all that is kept for the backward pass. Recomputing them ("remaking", below) costs a copy,
or two or three multiplications an element, which is nothing beside the linear itself. The operations are those of the
forward pass, so the gradient is the same bit for bit.

In the same way the projection before an activation can be run again (``remakes_output``): at the cost of one product,
the activation's input need not be kept either.

Megatron's selective recompute of ``layernorm`` has the same aim. It empties and refills storages, relies on the order
of events in its Transformer Engine layers, and does not cover dense activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

_RECIPE = "_megatron_cocoa_remake"


def remember(output: Tensor, remake: Callable[[], Tensor]) -> Tensor:
    """Let a linear that reads ``output`` keep ``remake`` instead of the tensor; returns ``output``, marked.

    Args:
        output: any tensor. Views and copies of it lose the mark and are kept as usual.
        remake: returns the same values; called under ``no_grad``, once in each linear's backward pass. It should refer
            only to tensors that are kept anyway.
    """
    setattr(output, _RECIPE, remake)
    return output


def recipe_of(x: Tensor) -> Callable[[], Tensor] | None:
    """The ``remake`` that ``x`` was marked with, or None."""
    return getattr(x, _RECIPE, None)


def reshaped(x: Tensor, *shape: int) -> Tensor:
    """``x.reshape(*shape)``, marked if ``x`` is."""
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
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return kept()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class RemadeColumnParallelLinear(ColumnParallelLinear):
    """Megatron's column-parallel linear, whose input is remade for the weight's gradient.

    It also adds a bias itself, in place: Megatron and its callers would write the sum to another tensor as wide as the
    ffn.

    Attributes:
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
            remember(output, lambda: self.forward(remake_input(), *args, **kwargs)[0])
        return output, None


class RemadeRowParallelLinear(RowParallelLinear):
    """Megatron's row-parallel linear, whose input is remade for the weight's gradient."""

    def forward(self, input_: Tensor):
        with _keeping_recipe(input_):
            return super().forward(input_)
