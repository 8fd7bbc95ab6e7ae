"""Values of parameters that are kept in FP8: what they are rounded by, and what their FP32 master weights start from.

Transformer Engine rounds such a parameter when it is constructed, from memory that nothing was written to yet, and
notes two things that loading does not change. Under delayed scaling, the largest number it saw there: a scale that is
chosen by it makes zeros of all weights, for as many updates as the history is long. And the numbers themselves, which
Megatron's optimizer makes master weights of. Without them it takes the rounded parameter, which lies on FP8's own grid:
a pretrained weight has lost what was rounded off, and has half a step of the grid to go before it changes at all.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor, post_all_gather_processing
from torch import Tensor, nn

LARGEST_E4M3 = 448.0
"""Weights are E4M3 in every recipe that keeps them in FP8."""

_VALUES, _GET, _CLEAR = "_high_precision_init_val", "get_high_precision_init_val", "clear_high_precision_init_val"
"""Transformer Engine's attributes of a parameter; Megatron calls the latter two."""


def forget_construction(parameter: nn.Parameter) -> None:
    """Drop the numbers that ``parameter`` was made of, if it has any."""
    for name in (_VALUES, _GET, _CLEAR):
        if hasattr(parameter, name):
            delattr(parameter, name)


@torch.no_grad()
def set_values(parameter: nn.Parameter, values: Tensor) -> None:
    """Copy ``values``, of the parameter's shape, into a parameter.

    One in FP8 is rounded by the scale that they need, and master weights start from them; they wait in the host's
    memory until the optimizer is built, as Megatron's own do.
    """
    if not is_float8tensor(parameter):
        parameter.copy_(values)
        return
    quantizer = parameter._get_quantizer()
    if hasattr(quantizer, "scale"):
        largest = float(values.abs().max())
        quantizer.amax.fill_(largest)
        quantizer.scale.fill_(LARGEST_E4M3 / largest if largest else 1.0)
    parameter.copy_(values)
    if parameter.requires_grad:
        kept = values.to("cpu", copy=True)
        setattr(parameter, _GET, lambda: kept)
        setattr(parameter, _CLEAR, lambda: forget_construction(parameter))


def follow_gathered(parameters: Iterable[nn.Parameter]) -> None:
    """Make anew what Transformer Engine keeps beside trained FP8 parameters, their copies by columns, after a gather.

    The backward pass multiplies by those copies.
    """
    post_all_gather_processing([p for p in parameters if p.requires_grad and is_float8tensor(p)])


def whole_values(tensor: Tensor) -> Tensor:
    """``tensor``; of one in FP8 its values in the dtype that it stands for, in host memory."""
    return dequantize_fp8_tensor(tensor).cpu() if is_float8tensor(tensor) else tensor
