"""Segments over variable-length flash kernels: flash-attn, torch's own varlen attention, Transformer Engine.

Query segments tile the pack, so queries go in as they are. Key segments of the collaborative mask overlap at the
bridge: then keys and values are gathered to one row per segment member (about 2 n rows) for a single call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_cocoa.model.segments import SegmentTable
from megatron_cocoa.parallel.device import upload

UNFUSED = "NVTE_UNFUSED_ATTN"


@dataclass(frozen=True)
class VarlenCall:
    """One kernel call: query rows ``[q_start, q_end)`` of the pack, as consecutive segments.

    k_rows: rows of the pack that form the key sequence, in segment order; a slice where they are contiguous.
    cu_q, cu_k: int32 ``(segments + 1,)`` offsets on the device.
    same_lengths: each segment has as many queries as keys.
    """

    q_rows: slice
    k_rows: Tensor | slice
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool
    same_lengths: bool


def build_calls(table: SegmentTable, device: torch.device) -> tuple[VarlenCall, ...]:
    """One call per run of segments that agree on causality; almost always a single one."""
    edges = np.flatnonzero(np.diff(table.causal.astype(np.int8))) + 1
    calls = []
    for members in np.split(np.arange(len(table.rows)), edges):
        rows = table.rows[members]
        q_len, k_len = rows[:, 1] - rows[:, 0], rows[:, 3] - rows[:, 2]
        k_rows = np.concatenate([np.arange(a, b) for a, b in rows[:, 2:]])
        run = slice(int(k_rows[0]), int(k_rows[-1]) + 1)
        contiguous = np.array_equal(k_rows, np.arange(run.start, run.stop))
        calls.append(
            VarlenCall(
                q_rows=slice(int(rows[0, 0]), int(rows[-1, 1])),
                k_rows=run if contiguous else upload(k_rows, device),
                cu_q=_offsets(q_len, device),
                cu_k=_offsets(k_len, device),
                max_q=int(q_len.max()),
                max_k=int(k_len.max()),
                causal=bool(table.causal[members[0]]),
                same_lengths=np.array_equal(q_len, k_len),
            )
        )
    return tuple(calls)


def _offsets(lengths: np.ndarray, device: torch.device) -> Tensor:
    return upload(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), device)


def attend_with(
    kernel: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, table: SegmentTable, scale: float
) -> Tensor:
    """Run ``kernel(query, key, value, call, scale)`` over a table's calls; shapes as in ``sdpa.attend``."""
    calls = table.plans.get("varlen")
    if calls is None:
        calls = table.plans["varlen"] = build_calls(table, query.device)
    outputs = []
    for call in calls:
        whole = isinstance(call.k_rows, slice)
        k, v = (x[call.k_rows] if whole else x.index_select(0, call.k_rows) for x in (key, value))
        outputs.append(kernel(query[call.q_rows], k, v, call, scale))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, call: VarlenCall, scale: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query, key, value, call.cu_q, call.cu_k, call.max_q, call.max_k, softmax_scale=scale, causal=call.causal
    )


def _torch_varlen(query: Tensor, key: Tensor, value: Tensor, call: VarlenCall, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Before torch 2.12 it took fewer key heads than query heads without being told.
    told = "enable_gqa" in _varlen_parameters() and query.shape[1] != key.shape[1]
    window = (-1, 0) if call.causal else (-1, -1)
    more = {"enable_gqa": True} if told else {}
    return varlen_attn(
        query, key, value, call.cu_q, call.cu_k, call.max_q, call.max_k, scale=scale, window_size=window, **more
    )


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


def flash_kernel() -> Callable[..., Tensor] | None:
    """flash-attn's variable-length kernel where installed, else torch's own, else None."""
    if importlib.util.find_spec("flash_attn") is not None:
        return _flash_attn
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        # Its first release (torch 2.10) takes neither a scale nor a window.
        return _torch_varlen if {"scale", "window_size"} <= _varlen_parameters() else None
    return None


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    return frozenset(inspect.signature(importlib.import_module("torch.nn.attention.varlen").varlen_attn).parameters)


def transformer_engine_kernel() -> Callable[..., Tensor] | None:
    """Transformer Engine's variable-length attention, or None where the package is absent."""
    return _transformer_engine if importlib.util.find_spec("transformer_engine") is not None else None
