"""Variable-length attention kernels for a GPU: flash-attn 2 to 4, the one inside of torch, Transformer Engine's.

Each takes ``(query, key, value, call, scale)``: tensors ``(rows, heads, head_dim)`` in BF16 or FP16 as ``call``, a
``varlen.VarlenCall``, describes them, with fewer key than query heads if need be. It returns the query's shape.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_cocoa.model.varlen import VarlenCall
from megatron_cocoa.parallel import device

UNFUSED = "NVTE_UNFUSED_ATTN"
Kernel = Callable[[Tensor, Tensor, Tensor, VarlenCall, float], Tensor]


def _flash_attn(module: str, query: Tensor, key: Tensor, value: Tensor, call: VarlenCall, scale: float) -> Tensor:
    out = importlib.import_module(module).flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=call.cu_q,
        cu_seqlens_k=call.cu_k,
        max_seqlen_q=call.max_q,
        max_seqlen_k=call.max_k,
        softmax_scale=scale,
        causal=call.causal,
    )
    # flash-attn 4 and early releases of 3 return the logarithms of the softmax's sums beside.
    return out[0] if isinstance(out, tuple) else out


def _torch_flash(query: Tensor, key: Tensor, value: Tensor, call: VarlenCall, scale: float) -> Tensor:
    # The operator below torch's varlen_attn, which wraps it and its gradient into operators written in Python (more of
    # the host's time than the call itself), and takes a scale only from torch 2.11 on. Dropout and debugging are off.
    window = (-1, 0) if call.causal else (-1, -1)
    out, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        call.cu_q,
        call.cu_k,
        call.max_q,
        call.max_k,
        0.0,
        call.causal,
        False,
        scale=scale,
        window_size_left=window[0],
        window_size_right=window[1],
    )
    return out


@functools.lru_cache(maxsize=8)
def _te_module(heads: int, groups: int, dim: int, scale: float, attention_type: str):
    te = importlib.import_module("transformer_engine.pytorch")
    return te.DotProductAttention(
        heads,
        dim,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="thd",
        softmax_scale=scale,
        attention_type=attention_type,
    )


def _transformer_engine(query: Tensor, key: Tensor, value: Tensor, call: VarlenCall, scale: float) -> Tensor:
    # It takes lengths of keys for those of queries unless told otherwise, and no part of a longer tensor.
    kind = "self" if call.same_lengths else "cross"
    module = _te_module(query.shape[1], key.shape[1], query.shape[2], scale, kind)
    query, key, value = (x.clone() if x.storage_offset() else x for x in (query, key, value))
    with _fused_kernels_alone():
        out = module(
            query,
            key,
            value,
            qkv_format="thd",
            cu_seqlens_q=call.cu_q,
            cu_seqlens_kv=call.cu_k,
            max_seqlen_q=call.max_q,
            max_seqlen_kv=call.max_k,
            attn_mask_type="padding_causal" if call.causal else "padding",
        )
    return out.view(query.shape)


@contextlib.contextmanager
def _fused_kernels_alone() -> Iterator[None]:
    """Transformer Engine refuses what it has no fused kernel for.

    It would compute all scores, fifty times slower, and say so in its debug log alone. It reads the environment where
    it chooses; Megatron sets the same variable to 1 for each language model, and refuses to find another value.
    """
    before = os.environ.get(UNFUSED)
    os.environ[UNFUSED] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[UNFUSED]
        else:
            os.environ[UNFUSED] = before


def flash_kernel() -> Kernel | None:
    """The fastest flash-attn that is installed and serves this GPU, else torch's own, else None."""
    for major in device.usable_flash_attn():
        return functools.partial(_flash_attn, device.FLASH_ATTN[major])
    return _torch_flash if _torch_has_flash() else None


@functools.cache
def _torch_has_flash() -> bool:
    """Whether this torch's operator, which is not public, takes what it is handed here."""
    operator = getattr(torch.ops.aten, "_flash_attention_forward", None)
    names = {argument.name for argument in operator.default._schema.arguments} if operator is not None else set()
    return {"cum_seq_q", "max_q", "is_causal", "scale", "window_size_left", "window_size_right"} <= names


def transformer_engine_kernel() -> Kernel | None:
    """Transformer Engine's variable-length attention, or None where the package is absent."""
    return _transformer_engine if device.is_installed("transformer_engine") else None
