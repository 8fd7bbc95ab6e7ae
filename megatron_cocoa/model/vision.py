"""The vision tower on Megatron-Core layers: patches in, features for the language model out.

Pictures are packed along one sequence; windows and frames are segments of it. The tower is tensor-parallel. It does
not run sequence-parallel (its norms see all rows on each tensor-parallel rank, so their gradients are whole), and
under context parallelism whole pictures are divided over the ranks and their features gathered: attention never
crosses a picture, so nothing else has to be exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from megatron_cocoa.architecture import VisionArchitecture
from megatron_cocoa.model.attention import SequenceContext
from megatron_cocoa.model.recompute import input_of_layers
from megatron_cocoa.model.remade import reshaped
from megatron_cocoa.model.rope import vision_tables
from megatron_cocoa.model.specs import BackendSpecProvider, block_spec, projection_spec
from megatron_cocoa.model.transformer_configs import ModelConfigs
from megatron_cocoa.model.vision_layout import Grid, VisionLayout, build_layout
from megatron_cocoa.parallel import device
from megatron_cocoa.parallel.collectives import gather_rows


class PatchEmbed(MegatronModule):
    """Linear embedding of flattened patches: Hugging Face's ``Conv3d``, whose stride equals its kernel.

    Its weight is kept as the matrix that it is, ``(hidden_size, patch_dim)``.
    """

    def __init__(self, config, patch_dim: int):
        super().__init__(config=config)
        self.proj = nn.Linear(patch_dim, config.hidden_size, bias=False, dtype=config.params_dtype)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj(pixel_values.to(self.proj.weight.dtype))


class VisionModel(MegatronModule):
    """Tower and merger, on the first pipeline stage.

    Args:
        architecture: the tower's numbers.
        configs: Megatron configs; ``vision`` and ``projection`` are used.
        provider: local or Transformer Engine modules.
    """

    def __init__(self, architecture: VisionArchitecture, configs: ModelConfigs, provider: BackendSpecProvider):
        super().__init__(config=configs.vision)
        self.architecture = architecture
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.context_group = groups.cp
        self.patch_embed = PatchEmbed(configs.vision, architecture.patch_dim)
        self.decoder = TransformerBlock(
            config=configs.vision,
            spec=block_spec(provider, configs.vision, architecture.depth),
            post_layer_norm=True,
            pre_process=True,
            post_process=True,
            pg_collection=groups,
        )
        self.projection = MultimodalProjector(
            configs.projection,
            projection_spec(provider),
            "mlp",
            architecture.hidden_size * architecture.patches_per_unit,
            tp_group=groups.tp,
        )

    def forward(self, pixel_values: Tensor | None, grid_thw: Sequence[Grid]) -> Tensor:
        """Features of all pictures of a micro-batch.

        Args:
            pixel_values: ``(patches, patch_dim)`` of all pictures, on every context-parallel rank; None without any.
            grid_thw: their grids in patches.

        Returns:
            ``(merged_units, out_hidden_size)`` in the batch's order, on every context-parallel rank; its backward
            sums the gradients that the ranks' parts of the sequence send back. Without pictures ``(0, ...)``, still
            attached to every parameter of the tower, so that gradient reduction finds a gradient on each rank.
        """
        size = self.context_group.size()
        if size == 1:
            return self._features(pixel_values, grid_thw)
        shares = divide_pictures(grid_thw, size)
        patches = np.concatenate([[0], np.cumsum([t * h * w for t, h, w in grid_thw], dtype=np.int64)])
        first, last = shares[self.context_group.rank()]
        mine = None if first == last else pixel_values[patches[first] : patches[last]]
        units = tuple(int(patches[b] - patches[a]) // self.architecture.patches_per_unit for a, b in shares)
        return gather_rows(self._features(mine, grid_thw[first:last]), units, self.context_group)

    def _features(self, pixel_values: Tensor | None, grid_thw: Sequence[Grid]) -> Tensor:
        if not grid_thw:
            merge = self.architecture.spatial_merge_size
            nothing = torch.zeros(merge * merge, self.architecture.patch_dim, device=device.device())
            return self._encode(nothing, [(1, merge, merge)])[:0]
        return self._encode(pixel_values, grid_thw)

    def _encode(self, pixel_values: Tensor, grid_thw: Sequence[Grid]) -> Tensor:
        layout = build_layout(grid_thw, self.architecture)
        if pixel_values.shape[0] != len(layout.patch_order):
            needed = len(layout.patch_order)
            raise ValueError(f"{pixel_values.shape[0]} patches for grids {list(grid_thw)}: {needed} needed")
        embedded = self.patch_embed(pixel_values)
        if layout.is_reordered:
            # Rather than the pixels, whose copy would be kept for the weight's gradient.
            embedded = _reorder(embedded, layout.patch_order)
        cos, sin = vision_tables(device.upload(layout.positions, pixel_values.device), self.architecture)
        hidden = self.decoder(
            hidden_states=input_of_layers(embedded.unsqueeze(1), self.decoder),
            attention_mask=None,
            packed_seq_params=self._context(layout, cos, sin),
        )
        units = reshaped(hidden, -1, 1, hidden.shape[-1] * self.architecture.patches_per_unit)
        merged = self.projection(units).squeeze(1)
        return _reorder(merged, _inverse(layout.unit_order)) if layout.is_reordered else merged

    def _context(self, layout: VisionLayout, cos: Tensor, sin: Tensor) -> SequenceContext:
        full = {index + 1: layout.frames for index in self.architecture.fullatt_block_indexes}
        return SequenceContext(segments=layout.windows, layer_segments=full, cos=cos, sin=sin)


def _reorder(rows: Tensor, order: np.ndarray) -> Tensor:
    """``rows[order]`` for a permutation of all of them."""
    return _Reorder.apply(rows, *(device.upload(x, rows.device) for x in (order, _inverse(order))))


def _inverse(order: np.ndarray) -> np.ndarray:
    # Sorting, which gives the same, takes twenty times as long.
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse


class _Reorder(torch.autograd.Function):
    """Rows in another order; the gradient is gathered by the inverse, where torch's would be added up from zeros."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.index_select(0, ctx.inverse), None, None


def divide_pictures(grid_thw: Sequence[Grid], parts: int) -> list[tuple[int, int]]:
    """Cut pictures into ``parts`` runs ``[first, last)`` of about equal patches, in order; runs may be empty."""
    ends = np.cumsum([t * h * w for t, h, w in grid_thw], dtype=np.float64) if grid_thw else np.zeros(0)
    middle = ends - np.array([t * h * w for t, h, w in grid_thw]) / 2 if len(ends) else ends
    total = ends[-1] if len(ends) else 0.0
    cuts = [int(np.searchsorted(middle, total * part / parts)) for part in range(parts)] + [len(ends)]
    return list(zip(cuts[:-1], cuts[1:]))
