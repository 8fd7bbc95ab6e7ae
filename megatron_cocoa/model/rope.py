"""Rotary tables: 2-D positions for the tower, M-RoPE for the language model; once per micro-batch.

Angles are computed in FP32 as Hugging Face does. The tower rotates in FP32; the language model casts its tables
to the activations' dtype first, again as Hugging Face does, so that BF16 results agree.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megatron_cocoa.architecture import TextArchitecture, VisionArchitecture
from megatron_cocoa.parallel.device import is_on_gpu


class _Rotate(torch.autograd.Function):
    """Keeps the tables alone for the backward, which turns the other way."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _turn(grad, *ctx.saved_tensors, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    if is_on_gpu(x):
        from megatron_cocoa.model import kernels

        return kernels.rotate(x, cos, sin, sign=sign)
    # Both halves go into one buffer: concatenating a few channels costs a CPU more than the rotation itself.
    half = x.shape[-1] // 2
    wide = x.to(cos.dtype)
    first, second = wide[..., :half], wide[..., half:]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    out = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split layout, as in Hugging Face's ``apply_rotary_pos_emb``.

    Args:
        x: ``(tokens, heads, head_dim)``.
        cos, sin: ``(tokens, head_dim / 2)``; the rotation runs in their dtype (on a GPU in
            float32) and returns to that of ``x``.
    """
    return _Rotate.apply(x, cos, sin)


@functools.lru_cache(maxsize=32)
def _inverse_frequencies(theta: float, dim: int, device: torch.device) -> Tensor:
    """``theta ** (-2 i / dim)`` for ``i < dim / 2``; float32."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


@functools.lru_cache(maxsize=32)
def _axis_of_channel(section: tuple[int, ...], device: torch.device) -> Tensor:
    """Which of time, height, width turns each channel; int64 ``(head_dim / 2,)``."""
    return torch.repeat_interleave(torch.arange(len(section)), torch.tensor(section)).to(device)


def vision_tables(positions: Tensor, vision: VisionArchitecture) -> tuple[Tensor, Tensor]:
    """Cosine and sine for the tower: the first half of the channels turns with height, the second with width.

    Args:
        positions: int64 ``(patches, 2)``.

    Returns:
        Two float32 ``(patches, head_dim / 2)``.
    """
    inv_freq = _inverse_frequencies(vision.rope_theta, vision.hidden_size // vision.num_heads // 2, positions.device)
    angles = (positions.float()[:, :, None] * inv_freq).flatten(1)
    return angles.cos(), angles.sin()


def mrope_tables(position_ids: Tensor, text: TextArchitecture, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine for the language model.

    Args:
        position_ids: int64 ``(3, tokens)``: time, height, width.
        dtype: of the activations.

    Returns:
        Two ``(tokens, head_dim / 2)`` in ``dtype``.
    """
    inv_freq = _inverse_frequencies(text.rope_theta, text.head_dim, position_ids.device)
    positions = position_ids.index_select(0, _axis_of_channel(text.mrope_section, position_ids.device))
    # Contiguous: rotation reads these rows in every layer.
    angles = positions.t().float().contiguous() * inv_freq
    return angles.cos().to(dtype), angles.sin().to(dtype)
