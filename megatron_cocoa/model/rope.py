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
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _turned(grad, *ctx.saved_tensors, -1.0), None, None


class _SplitAndRotate(torch.autograd.Function):
    """Keeps the tables alone, too; each way every row is read once and written once."""

    @staticmethod
    def forward(ctx, fused: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.shape = tokens, groups, parts, dim = fused.shape
        query, key, value = (fused.new_empty(tokens, groups * n, dim) for n in (parts - 2, 1, 1))
        if is_on_gpu(fused):
            from megatron_cocoa.model import kernels

            kernels.split_and_rotate(fused.contiguous(), (query, key, value), cos, sin, join=False)
        else:
            _turn(fused[:, :, :-2], cos, sin, 1.0, out=query.view(tokens, groups, parts - 2, dim))
            _turn(fused[:, :, -2], cos, sin, 1.0, out=key)
            value.copy_(fused[:, :, -1])
        return query, key, value

    @staticmethod
    def backward(ctx, query: Tensor, key: Tensor, value: Tensor):
        cos, sin = ctx.saved_tensors
        tokens, groups, parts, dim = ctx.shape
        fused = query.new_empty(ctx.shape)
        if is_on_gpu(query):
            from megatron_cocoa.model import kernels

            apart = [x.contiguous() for x in (query, key, value)]
            kernels.split_and_rotate(fused, apart, cos, sin, join=True)
        else:
            _turn(query.reshape(tokens, groups, parts - 2, dim), cos, sin, -1.0, out=fused[:, :, :-2])
            _turn(key, cos, sin, -1.0, out=fused[:, :, -2])
            fused[:, :, -1] = value
        return fused, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """``x`` ``(tokens, heads, head_dim)``, turned by ``sign`` times the angle of its token."""
    if is_on_gpu(x):
        from megatron_cocoa.model import kernels

        return kernels.rotate(x, cos, sin, sign=sign)
    return _turn(x, cos, sin, sign, out=x.new_empty(x.shape))


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float, *, out: Tensor) -> Tensor:
    """``_turned`` on a CPU, of ``(tokens, ..., head_dim)``, in ``out`` of its shape."""
    # Both halves go into one buffer: concatenating a few channels costs a CPU more than the rotation itself.
    half = x.shape[-1] // 2
    wide = x.to(cos.dtype)
    first, second = wide[..., :half], wide[..., half:]
    cos, sin = (table.view(len(table), *(1,) * (x.dim() - 2), half) for table in (cos, sin))
    turned = out if out.dtype == cos.dtype else torch.empty(x.shape, dtype=cos.dtype, device=x.device)
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first, sin, value=sign)
    return out if turned is out else out.copy_(turned)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split layout, as in Hugging Face's ``apply_rotary_pos_emb``.

    Args:
        x: ``(tokens, heads, head_dim)``.
        cos, sin: ``(tokens, head_dim / 2)``; the rotation runs in their dtype (on a GPU in
            float32) and returns to that of ``x``.
    """
    return _Rotate.apply(x, cos, sin)


def split_and_rotate(fused: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of a fused projection, rotated, and its values, each contiguous.

    Args:
        fused: ``(tokens, groups, heads / groups + 2, head_dim)``: of each group its query heads, its key, its value.
        cos, sin: as of ``rotate``.

    Returns:
        ``(tokens, heads, head_dim)`` and twice ``(tokens, groups, head_dim)``.
    """
    return _SplitAndRotate.apply(fused, cos, sin)


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
