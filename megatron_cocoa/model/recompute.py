"""Activation recompute beside frozen weights."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor


def input_of_layers(hidden_states: Tensor, block: TransformerBlock) -> Tensor:
    """``hidden_states`` as the first layer of ``block`` needs them: asking for a gradient where it recomputes.

    What Megatron recomputes, a layer or an MLP, is one function of its input to autograd. Where the embedding below is
    frozen that input asks for no gradient, and the adapters inside would silently get none. Layers of which nothing
    trains have no backward pass.
    """
    config = block.config
    recomputes = config.recompute_granularity == "full" or "mlp" in (config.recompute_modules or ())
    lacks_gradient = torch.is_grad_enabled() and not hidden_states.requires_grad
    if recomputes and lacks_gradient and any(p.requires_grad for p in block.layers.parameters()):
        hidden_states.requires_grad_()
    return hidden_states
