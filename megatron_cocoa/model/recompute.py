"""Activation recompute beside frozen weights."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def input_of_layers(hidden_states: Tensor, config: TransformerConfig) -> Tensor:
    """``hidden_states`` as the first layer needs them: asking for a gradient where layers are recomputed.

    Recompute of whole layers is one function of its input to autograd. Where the embedding below is frozen that input
    asks for no gradient, and the adapters inside would silently get none.
    """
    if config.recompute_granularity == "full" and torch.is_grad_enabled() and not hidden_states.requires_grad:
        hidden_states.requires_grad_()
    return hidden_states
