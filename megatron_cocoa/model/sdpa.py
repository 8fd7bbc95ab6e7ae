"""Segments over torch's scaled-dot-product attention: the backend that runs everywhere.

A loop over segments would pay a kernel launch for each caption and each window. Segments of equal shape are
batched instead, and shapes that are close are padded to a common one where that is cheaper than another call;
padding is masked by key. Samples so short that their segments are not worth a call each run whole, under a mask of
their own length squared (see ``sdpa_plan``). Where the batched segments lie one after the other, queries and keys are
views of the pack; else rows are gathered. Rows go to the buckets and back through two autograd functions, since
torch's own slices and gathers would each fill a gradient as long as the pack.

Shape legend: T rows of the pack, N segments in a bucket, Q query rows and K key rows per segment, H query heads,
G key-value heads, R = H / G, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_cocoa.model.remade import remember
from megatron_cocoa.model.sdpa_plan import Bucket, SdpaPlan, build_plan
from megatron_cocoa.model.segments import SegmentTable


def attend(query: Tensor, key: Tensor, value: Tensor, table: SegmentTable, scale: float) -> Tensor:
    """Attention of a packed sequence by its segment table.

    Args:
        query: ``(T, H, D)``, local heads.
        key, value: ``(T, G, D)`` with G dividing H.
        table: who attends to whom; ``table.length == T``.
        scale: multiplies the scores before the softmax.

    Returns:
        ``(T, H, D)`` in the dtype of ``query``.
    """
    plan = table.plans.get("sdpa")
    if plan is None:
        channels = query.shape[1] * query.shape[2]
        plan = table.plans["sdpa"] = build_plan(table, query.device, channels=channels)
    if plan.is_one_view:
        parts = [(query, key, value)]
    else:
        parts = list(zip(_TakeQueries.apply(query, plan), _TakeKeys.apply(key, plan), _TakeKeys.apply(value, plan)))
    outputs = [_run_bucket(bucket, *rows, scale) for bucket, rows in zip(plan.buckets, parts)]
    rows = [as_rows(out) for out, as_rows in outputs]
    joined = rows[0] if plan.is_one_view else _Join.apply(plan, *rows)
    if not joined.requires_grad:
        return joined
    # SDPA keeps its outputs anyway, so that a linear which reads the joined rows need not keep them.
    kept = [(out.detach(), as_rows) for out, as_rows in outputs]
    return remember(joined, lambda: _in_order([as_rows(out) for out, as_rows in kept], plan))


def _run_bucket(
    bucket: Bucket, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What SDPA returns, and what makes ``(N * Q, H, D)`` of it."""
    heads, groups, dim = query.shape[1], key.shape[1], query.shape[2]
    ratio = heads // groups
    n, q_len, k_len = bucket.num, bucket.q_len, bucket.k_len
    k_NGKD, v_NGKD = (x.view(n, k_len, groups, dim).transpose(1, 2) for x in (key, value))
    if ratio == 1 or bucket.is_square or not _fills_threads(n * groups, query.device):
        q_NHQD = query.view(n, q_len, heads, dim).transpose(1, 2)
        by_kernel = ratio > 1 and query.device.type == "cpu"
        if ratio > 1 and not by_kernel:
            # With a mask, no fused GPU kernel takes fewer key heads than query heads.
            k_NGKD, v_NGKD = (x.repeat_interleave(ratio, dim=1) for x in (k_NGKD, v_NGKD))
        out = scaled_dot_product_attention(
            q_NHQD, k_NGKD, v_NGKD, attn_mask=bucket.mask, is_causal=bucket.causal, scale=scale, enable_gqa=by_kernel
        )
        return out, lambda out: out.transpose(1, 2).reshape(n * q_len, heads, dim)
    # The R query heads of a group share its keys: laid along the query axis they need no repeated keys.
    q_NGqD = query.view(n, q_len, groups, ratio, dim).permute(0, 2, 3, 1, 4).reshape(n, groups, ratio * q_len, dim)
    out = scaled_dot_product_attention(q_NGqD, k_NGKD, v_NGKD, attn_mask=bucket.mask, scale=scale)
    split = (n, groups, ratio, q_len, dim)
    return out, lambda out: out.view(split).permute(0, 3, 1, 2, 4).reshape(n * q_len, heads, dim)


def _fills_threads(num: int, device: torch.device) -> bool:
    """Whether ``num`` heads of segments are work for all: torch's CPU kernel divides its backward pass by those alone.

    On a GPU the backward pass is divided by key blocks and heads, and few heads of long queries leave it idle.
    """
    threads = torch.get_num_threads()
    return device.type == "cpu" and (num % threads == 0 or num >= 4 * threads)


def _pick(x: Tensor, rows: Tensor | slice) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _in_order(parts: Sequence[Tensor], plan: SdpaPlan) -> Tensor:
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined if plan.output_rows is None else joined.index_select(0, plan.output_rows)


class _TakeQueries(torch.autograd.Function):
    """``(T, ...)`` to each bucket's query rows; backward puts them back in order, which drops padding."""

    @staticmethod
    def forward(ctx, x: Tensor, plan: SdpaPlan) -> tuple[Tensor, ...]:
        ctx.plan = plan
        return tuple(_pick(x, bucket.q_rows) for bucket in plan.buckets)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return _in_order(gradients, ctx.plan), None


class _TakeKeys(torch.autograd.Function):
    """``(T, ...)`` to each bucket's key rows; backward sums over the segments that a row is a key of."""

    @staticmethod
    def forward(ctx, x: Tensor, plan: SdpaPlan) -> tuple[Tensor, ...]:
        ctx.plan, ctx.shape = plan, x.shape
        return tuple(_pick(x, bucket.k_rows) for bucket in plan.buckets)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        total = gradients[0].new_zeros(ctx.shape)
        for bucket, gradient in zip(ctx.plan.buckets, gradients):
            if isinstance(bucket.k_rows, slice):
                total[bucket.k_rows] += gradient
            else:
                total.index_add_(0, bucket.k_rows, gradient)
        return total, None


class _Join(torch.autograd.Function):
    """The buckets' outputs to ``(T, ...)``; padded queries get a gradient of zero, or their keys would learn twice."""

    @staticmethod
    def forward(ctx, plan: SdpaPlan, *outputs: Tensor) -> Tensor:
        ctx.plan = plan
        return _in_order(outputs, plan)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        parts = []
        for bucket in ctx.plan.buckets:
            part = _pick(gradient, bucket.q_rows)
            if bucket.padded_q is not None:
                part = part.index_fill(0, bucket.padded_q, 0)
            parts.append(part)
        return None, *parts
