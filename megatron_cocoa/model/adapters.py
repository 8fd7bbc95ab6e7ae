"""Adapters on a model: put on loaded weights, trained instead of them, and merged into them at the end of a stage.

An adapter is a module beside the projection that it changes (``linear_qkv_adapter`` beside ``linear_qkv``). The
projection keeps its own name and does not know of it: a model whose adapters have been merged is an ordinary model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from megatron_cocoa.config import TrainSettings
from megatron_cocoa.model.adapter_targets import check_targets, find_sites
from megatron_cocoa.model.build import Model, freeze_pretrained
from megatron_cocoa.model.linear_adapter import LinearAdapter

SUFFIX = "_adapter"


def attach_adapters(model: Model, settings: TrainSettings, *, mask_token_id: int | None) -> None:
    """Freeze the pretrained weights and add adapters, which change nothing until A has been drawn and B trained.

    Args:
        model: bare chunks with their weights loaded (DoRA's magnitudes start at the length of their rows).
        settings: of the run; ``adapter`` says which kind, where and how large.
        mask_token_id: row of the embedding that trains beside the adapters; None for none.

    Raises:
        ValueError: if no module of the model has a name in ``vision_targets``.
    """
    adapter = settings.adapter
    check_targets(model.architecture, adapter)
    for chunk in model.bare_chunks:
        freeze_pretrained(chunk, mask_token_id)
        for site in list(find_sites(chunk, adapter)):
            _put_beside(site.parent, site.name, LinearAdapter(site, adapter))


def adapted_projections(model: Model) -> Iterator[tuple[nn.Module, str, LinearAdapter]]:
    """``(parent, name of the projection, adapter)`` of every projection of this rank that has adapters."""
    for chunk in model.bare_chunks:
        for parent in list(chunk.modules()):
            for name, module in list(parent.named_children()):
                if isinstance(module, LinearAdapter):
                    yield parent, name.removesuffix(SUFFIX), module


@contextmanager
def merged_adapters(model: Model) -> Iterator[None]:
    """Inside the ``with`` block the model is merged (``merge_adapters``); afterwards it is as before, bit for bit.

    The unmerged weights are kept in host memory meanwhile. Without adapters nothing happens.
    """
    kept = []
    for parent, name, adapter in list(adapted_projections(model)):
        weight = getattr(parent, name).weight
        kept.append((parent, name, adapter, torch.empty_like(weight, device="cpu").copy_(weight.detach())))
    merge_adapters(model)
    try:
        yield
    finally:
        for parent, name, adapter, weight in kept:
            with torch.no_grad():
                getattr(parent, name).weight.copy_(weight)
            _put_beside(parent, name, adapter)


def _put_beside(parent: nn.Module, name: str, adapter: LinearAdapter) -> None:
    parent.add_module(name + SUFFIX, adapter)
    adapter.hook = getattr(parent, name).register_forward_hook(adapter.after_linear)


@torch.no_grad()
def merge_adapters(model: Model) -> None:
    """Add the adapters to the weights and remove them: the model computes what it did before, up to rounding.

    Which weights require gradients does not change. Collective over tensor-parallel ranks (row-parallel DoRA).
    """
    for parent, name, adapter in list(adapted_projections(model)):
        weight = getattr(parent, name).weight
        weight.copy_(adapter.merged(weight))
        adapter.hook.remove()
        delattr(parent, name + SUFFIX)
