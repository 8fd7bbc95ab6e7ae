"""Mask kinds as dense matrices, written row by row from the definitions in ``batch.MaskKind``.

They share nothing with the segments that the model attends by: what both agree on is the definition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_cocoa.batch import MaskKind


def visible_rows(kind: MaskKind, row: int, length: int, bridge: int | None) -> tuple[int, int]:
    """The run ``[first, last)`` of rows that ``row`` of a sample ``[0, length)`` with its bridge at ``bridge`` sees."""
    if kind is MaskKind.CAUSAL:
        return 0, row + 1
    if kind is MaskKind.BIDIRECTIONAL:
        return 0, length
    if row < bridge:
        return 0, bridge + 1
    if row > bridge:
        return bridge, length
    return (0, length) if kind is MaskKind.EOS_BRIDGED else (0, bridge + 1)


def dense_mask(
    kind: MaskKind, lengths: Sequence[int], bridges: Sequence[int | None] = (), tail_length: int = 0
) -> torch.Tensor:
    """Bool ``(rows, rows)`` of a pack, True where the row sees the column; bridges are global rows."""
    bridges = bridges or [None] * len(lengths)
    total = sum(lengths) + tail_length
    mask = torch.zeros(total, total, dtype=torch.bool)
    start = 0
    for length, bridge in zip(lengths, bridges):
        for row in range(length):
            first, last = visible_rows(kind, row, length, None if bridge is None else bridge - start)
            mask[start + row, start + first : start + last] = True
        start += length
    mask[start:, start:] = True
    return mask


def dense_attention(query, key, value, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax attention of ``(rows, heads, dim)`` tensors under a dense mask, keys repeated for their query heads."""
    ratio = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(ratio, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value)
