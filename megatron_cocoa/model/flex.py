"""Segments as a FlexAttention BlockMask: a reference that can be looked at, not a training path.

FlexAttention has no backward on CPU, and on GPU the variable-length kernels are faster at these shapes. Its block
mask prints as a picture, though, which makes it the place to see what a mask kind does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megatron_cocoa.model.segments import SegmentTable


def block_mask(table: SegmentTable, device: torch.device | str = "cpu") -> BlockMask:
    """The table's mask over ``(table.length, table.length)`` in blocks of 128; ``print`` it to see it."""
    low, high = (torch.from_numpy(x).to(device) for x in table.key_ranges())

    def visible(batch, head, query, key):
        return (low[query] <= key) & (key < high[query])

    return create_block_mask(visible, None, None, table.length, table.length, device=device)


def attend(query: Tensor, key: Tensor, value: Tensor, table: SegmentTable, scale: float) -> Tensor:
    """Attention by the block mask; shapes as in ``sdpa.attend``."""
    mask = table.plans.get("flex")
    if mask is None:
        mask = table.plans["flex"] = block_mask(table, query.device)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    out = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)
