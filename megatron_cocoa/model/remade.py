"""Linears that do not keep their input for the backward pass where it can be made again from what is kept anyway.

A norm keeps its input and an activation the projection before it; the linear behind either would keep the result as
well. Over a layer that is a quarter of all that stays for the backward pass, and making it again costs two or three
multiplications an element, nothing beside the linear itself. The operations are those of the forward pass, so the
gradient is the same bit for bit.

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


@contextlib.contextmanager
def _keeping_recipe(x: Tensor) -> Iterator[None]:
    remake = getattr(x, _RECIPE, None)
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
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.gather_output and self.bias is not None:
            raise ValueError("this linear adds a bias to its own columns: for gather_output take ColumnParallelLinear")
        self.skip_bias_add = True

    def forward(self, input_: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
        with _keeping_recipe(input_):
            output, bias = super().forward(input_, *args, **kwargs)
        return output if bias is None else output.add_(bias), None


class RemadeRowParallelLinear(RowParallelLinear):
    """Megatron's, whose input is made again for the weight's gradient."""

    def forward(self, input_: Tensor):
        with _keeping_recipe(input_):
            return super().forward(input_)
