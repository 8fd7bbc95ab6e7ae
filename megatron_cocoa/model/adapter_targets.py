"""Where adapters go: which Hugging Face modules a fused Megatron projection holds, and which rows belong to each.

Hugging Face's q, k and v are one ``linear_qkv`` here, whose rows run ``[q..q, k, v]`` per key-value head; gate and up
are one ``linear_fc1``. The owner of each row is computed for the whole projection and then divided like its weight, so
that it is right at every tensor-parallel size, even on a rank that holds no row of k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_cocoa.architecture import QwenVLArchitecture, VisionArchitecture
from megatron_cocoa.config import AdapterSettings
from megatron_cocoa.model.qwen_vl import QwenVL

NO_TARGET = -1
"""Owner of rows that no adapter changes: modules that are not targeted, and zero padding."""


@dataclass(frozen=True)
class Site:
    """A projection that gets adapters.

    parent:     module that holds it.
    name:       its name there, such as ``linear_qkv``.
    is_column:  column-parallel (output features are cut) rather than row-parallel (input features are).
    num_parts:  targeted Hugging Face modules in it.
    row_owners: int64 ``(rows,)`` of the whole projection: which part in ``[0, num_parts)`` each row belongs to, or
                ``NO_TARGET``.
    is_gated:   rows are ``[gate; up]``, each half cut by itself.
    """

    parent: nn.Module
    name: str
    is_column: bool
    num_parts: int
    row_owners: Tensor
    is_gated: bool

    @property
    def linear(self) -> nn.Module:
        return getattr(self.parent, self.name)


def find_sites(chunk: QwenVL, settings: AdapterSettings) -> Iterator[Site]:
    """The projections of a chunk that ``settings`` targets, tower first."""
    vision, text = chunk.architecture.vision, chunk.architecture.text
    if chunk.pre_process:
        tower, merger = chunk.vision_model.decoder, chunk.vision_model.projection.encoder
        for layer in tower.layers:
            for parent in (layer.self_attention, layer.mlp):
                yield from _sites(parent, tower_projections(vision), settings.vision_targets, vision.intermediate_size)
        yield from _sites(merger, MERGER_PROJECTIONS, settings.vision_targets, merger.config.ffn_hidden_size)
    for layer in chunk.language_model.decoder.layers:
        for parent in (layer.self_attention, layer.mlp):
            yield from _sites(parent, LANGUAGE_PROJECTIONS, settings.language_targets, text.intermediate_size)


def check_targets(architecture: QwenVLArchitecture, settings: AdapterSettings) -> None:
    """Refuse targets of which the model has none; names of the other family's tower may stand beside its own.

    Raises:
        ValueError: if no module of the tower has a name in ``vision_targets``.
    """
    projections = [*tower_projections(architecture.vision).values(), *MERGER_PROJECTIONS.values()]
    known = [module for modules in projections for module in modules]
    if settings.vision_targets and not set(settings.vision_targets) & set(known):
        raise ValueError(
            f"adapter.vision_targets {list(settings.vision_targets)} names no module of a {architecture.model_type} "
            f"tower: choose from {', '.join(known)}, or set [] for none"
        )


LANGUAGE_PROJECTIONS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
MERGER_PROJECTIONS = {"linear_fc1": ("mlp.0",), "linear_fc2": ("mlp.2",)}


def tower_projections(vision: VisionArchitecture) -> dict[str, tuple[str, ...]]:
    first, second = (("gate_proj", "up_proj"), "down_proj") if vision.gated else (("fc1",), "fc2")
    return {"linear_qkv": ("qkv",), "linear_proj": ("proj",), "linear_fc1": first, "linear_fc2": (second,)}


def _sites(
    parent: nn.Module, projections: dict[str, tuple[str, ...]], targets: tuple[str, ...], ffn_width: int
) -> Iterator[Site]:
    for name, modules in projections.items():
        targeted = [module for module in modules if module in targets]
        if not targeted or not hasattr(parent, name):
            continue
        numbers = [targeted.index(module) if module in targeted else NO_TARGET for module in modules]
        yield Site(
            parent=parent,
            name=name,
            is_column=name in ("linear_qkv", "linear_fc1"),
            num_parts=len(targeted),
            row_owners=_row_owners(parent.config, name, numbers, ffn_width),
            is_gated=name == "linear_fc1" and len(modules) == 2,
        )


def _row_owners(config: TransformerConfig, name: str, numbers: list[int], ffn_width: int) -> Tensor:
    """Owner of each row of the whole projection; ``numbers`` are those of its Hugging Face modules."""
    if name == "linear_qkv":
        queries = config.num_attention_heads // config.num_query_groups
        # The tower's q, k and v are one module at Hugging Face: one number for all three.
        q, k, v = numbers if len(numbers) == 3 else numbers * 3
        return torch.tensor(([q] * queries + [k, v]) * config.num_query_groups).repeat_interleave(config.kv_channels)
    if name == "linear_fc1":
        owners = torch.full((len(numbers), config.ffn_hidden_size), NO_TARGET)
        owners[:, :ffn_width] = torch.tensor(numbers).unsqueeze(1)
        return owners.flatten()
    return torch.full((config.hidden_size,), numbers[0])
