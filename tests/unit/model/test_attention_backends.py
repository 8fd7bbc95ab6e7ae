"""Every attention backend that runs without a GPU against a dense softmax, outputs and gradients."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.testing import assert_close

from megatron_cocoa import model
from megatron_cocoa.batch import MaskKind
from megatron_cocoa.model import attention, flex, rope, sdpa, sdpa_plan, varlen, varlen_kernels
from megatron_cocoa.model.attention import attend_function
from megatron_cocoa.model.rope import rotate, split_and_rotate
from megatron_cocoa.model.segments import SegmentTable, compile_segments
from tests.parity.masks import dense_attention, dense_mask

CPU = torch.device("cpu")
DIM = 4
# Softmax averages of at most 60 numbers of size one in float64: rounding is near 1e-15, anything else is a mistake.
EXACT = dict(rtol=1e-9, atol=1e-11)


@st.composite
def problems(draw):
    """A mask kind, a pack, and numbers of query heads per key-value head."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    bridges = [int(start) + draw(st.integers(0, length - 1)) for start, length in zip(starts, lengths)]
    heads = draw(st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]))
    return draw(st.sampled_from(MaskKind)), lengths, bridges, draw(st.integers(0, 3)), heads, draw(st.integers(0, 99))


def tensors(tokens: int, heads: tuple[int, int], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, heads[0], DIM), (tokens, heads[1], DIM), (tokens, heads[1], DIM)]
    return [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def check(attend, problem, *, backward: bool = True) -> None:
    kind, lengths, bridges, tail, heads, seed = problem
    table = compile_segments(kind, lengths, bridges, tail)
    inputs = tensors(table.length, heads, seed)
    wanted = dense_attention(*inputs, dense_mask(kind, lengths, bridges, tail), 0.7)
    found = attend(*inputs, table, 0.7)
    assert_close(found, wanted, **EXACT)
    if backward:
        weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
        for mine, theirs in zip(
            torch.autograd.grad(found, inputs, weight), torch.autograd.grad(wanted, inputs, weight)
        ):
            assert_close(mine, theirs, **EXACT)


@given(problem=problems())
def test_sdpa_is_dense_attention(problem):
    """Claim: bucketed SDPA gives the outputs and gradients of a dense softmax, grouped heads included."""
    check(sdpa.attend, problem)


@given(problem=problems(), cost=st.sampled_from([0, 3, 40, 10**9]))
def test_sdpa_does_not_depend_on_how_segments_are_bucketed(problem, cost):
    """Claim: padding segments to one shape is exact at every trade-off between padding and calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa_plan, "CALL_COST", cost)
        check(sdpa.attend, problem)


@given(problem=problems(), cost=st.sampled_from([0, 3, 40, 10**9]))
def test_buckets_hold_each_row_once(problem, cost):
    """Claim: a plan computes every query row of the pack exactly once; what it pads is never read back."""
    kind, lengths, bridges, tail, _, _ = problem
    table = compile_segments(kind, lengths, bridges, tail)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa_plan, "CALL_COST", cost)
        plan = sdpa_plan.build_plan(table, CPU)
    outputs = sum(bucket.num * bucket.q_len for bucket in plan.buckets)
    rows = torch.arange(table.length)
    computed = torch.cat([rows[b.q_rows] if isinstance(b.q_rows, slice) else b.q_rows for b in plan.buckets])
    assert len(computed) == outputs
    read = torch.arange(outputs) if plan.output_rows is None else plan.output_rows
    assert len(set(read.tolist())) == table.length
    assert torch.equal(computed[read], rows)
    assert sum(bucket.num for bucket in plan.buckets) in (len(table.rows), len(lengths) + (table.length > sum(lengths)))


@pytest.mark.parametrize("reach", [(2, 6, 4, 6), (2, 4, 2, 6)])
def test_rows_that_look_across_belong_to_one_sample(monkeypatch, reach):
    """Claim: whichever of two segments sees the other's keys, they run under one mask where calls are dear.

    Rows 0 and 1 see each other, so that whole samples run at all.
    """
    monkeypatch.setattr(sdpa_plan, "CALL_COST", 2**30)
    both = [(0, 1, 0, 2, False), (1, 2, 0, 2, False)]
    table = SegmentTable.from_rows(6, [*both, (2, 4, *reach[:2], False), (4, 6, *reach[2:], False)])
    low, high = (torch.from_numpy(x)[:, None] for x in table.key_ranges())
    keys = torch.arange(6)
    inputs = tensors(6, (2, 2), seed=0)
    wanted = dense_attention(*inputs, (low <= keys) & (keys < high), 0.7)
    assert_close(sdpa.attend(*inputs, table, 0.7), wanted, **EXACT)


def test_equal_segments_are_one_call():
    """Claim: a batch of equal windows or captions does not pay a kernel launch each."""
    plan = sdpa_plan.build_plan(SegmentTable.from_lengths([64] * 50), CPU)
    assert len(plan.buckets) == 1 and plan.output_rows is None and plan.buckets[0].mask is None


def test_a_plan_is_built_once_for_all_layers():
    """Claim: layers share the index tensors of their table."""
    table = SegmentTable.from_lengths([3, 5])
    inputs = tensors(8, (2, 2), 0)
    sdpa.attend(*inputs, table, 1.0)
    plan = table.plans["sdpa"]
    sdpa.attend(*inputs, table, 1.0)
    assert table.plans["sdpa"] is plan


@pytest.mark.parametrize("kind", MaskKind)
def test_flex_reference_is_sdpa(kind):
    """Claim: the inspectable block mask shows the mask that training uses. FlexAttention has no backward on CPU."""
    table = compile_segments(kind, [9, 1, 14], [4, 9, 23], 3)
    query, key, value = (x.detach().float() for x in tensors(table.length, (4, 2), 0))
    # float32: FlexAttention computes in it whatever it is given.
    assert_close(
        flex.attend(query, key, value, table, 0.5), sdpa.attend(query, key, value, table, 0.5), rtol=1e-5, atol=1e-6
    )


def varlen_kernel(query, key, value, call, scale):
    """What a variable-length flash kernel computes, written as a loop over its offsets."""
    outputs = []
    for index in range(len(call.cu_q) - 1):
        q = query[call.cu_q[index] : call.cu_q[index + 1]]
        k, v = (x[call.cu_k[index] : call.cu_k[index + 1]] for x in (key, value))
        assert 0 < len(q) <= call.max_q and 0 < len(k) <= call.max_k
        visible = torch.ones(len(q), len(k), dtype=torch.bool)
        outputs.append(dense_attention(q, k, v, visible.tril() if call.causal else visible, scale))
    assert call.cu_q[-1] == len(query) and call.cu_k[-1] == len(key)
    return torch.cat(outputs)


@given(problem=problems())
def test_varlen_calls_are_dense_attention(problem):
    """Claim: offsets and gathers handed to a flash kernel describe the mask; its gradients flow back to the pack."""
    check(lambda *arguments: varlen.attend_with(varlen_kernel, *arguments), problem)


@given(problem=problems())
@settings(max_examples=20)
def test_varlen_needs_one_call_unless_the_tail_differs(problem):
    """Claim: a pack costs one kernel call; only a causal pack with its non-causal tail costs two."""
    kind, lengths, bridges, tail, _, _ = problem
    calls = varlen.build_calls(compile_segments(kind, lengths, bridges, tail), CPU)
    assert len(calls) == (2 if kind is MaskKind.CAUSAL and tail else 1)
    for call in calls:
        assert call.cu_q.dtype == call.cu_k.dtype == torch.int32


def test_plain_packs_need_no_gather():
    """Claim: where key segments do not overlap, keys and values are used in place."""
    (call,) = varlen.build_calls(compile_segments(MaskKind.BIDIRECTIONAL, [5, 2, 8]), CPU)
    assert call.k_rows == slice(0, 15)


@pytest.mark.parametrize("kind", MaskKind)
def test_a_call_says_whether_queries_and_keys_have_the_same_lengths(kind):
    """Claim: Transformer Engine would else read the keys by the queries' offsets, also where both have as many rows."""
    (call,) = varlen.build_calls(compile_segments(kind, [5, 3], [2, 7]), CPU)
    assert call.same_lengths is not kind.needs_bridge and torch.equal(call.cu_q, call.cu_k) is call.same_lengths
    (call,) = varlen.build_calls(SegmentTable.from_rows(3, [(0, 1, 0, 2, False), (1, 3, 2, 3, False)]), CPU)
    assert not call.same_lengths


@pytest.mark.parametrize("kind", MaskKind)
def test_a_kernel_that_takes_the_whole_pack_gets_the_tensors_themselves(kind):
    """Claim: no copy stands between a layer and its kernel, in either pass, unless rows are gathered."""
    table = compile_segments(kind, [5, 2, 8], [2, 5, 9])
    inputs, taken = tensors(15, (2, 1), 0), []

    def kernel(query, key, value, call, scale):
        taken.extend([query, key, value])
        return query

    varlen.attend_with(kernel, *inputs, table, 1.0)
    own = 3 if kind in (MaskKind.CAUSAL, MaskKind.BIDIRECTIONAL) else 1
    assert all(x is y for x, y in zip(taken[:own], inputs))


def test_rotation_turns_pairs_of_channels():
    """Claim: channel pairs ``(i, i + dim / 2)`` turn as complex numbers by their angle."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 8, generator=generator, dtype=torch.float64)
    angles = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    assert_close(rotate(x, angles.cos(), angles.sin()), torch.cat([turned.real, turned.imag], dim=-1), **EXACT)


@pytest.mark.parametrize("tables", [torch.float64, torch.float32])
@pytest.mark.parametrize("groups, per_group", [(1, 1), (3, 1), (2, 4)])
def test_split_and_rotation_are_megatrons_split_then_the_rotation(groups, per_group, tables):
    """Claim: outputs and gradients are those of splitting, rotating and concatenating, to the bit."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(7, groups, per_group + 2, 8, generator=generator, dtype=torch.float64)
    angles = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    cos, sin = angles.cos().to(tables), angles.sin().to(tables)
    mine, theirs = fused.clone().requires_grad_(), fused.clone().requires_grad_()
    wanted = (
        rotate(theirs[:, :, :-2].reshape(7, -1, 8), cos, sin),
        rotate(theirs[:, :, -2], cos, sin),
        theirs[:, :, -1],
    )
    found = split_and_rotate(mine, cos, sin)
    gradients = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in wanted]
    torch.autograd.backward(found, gradients)
    torch.autograd.backward(wanted, gradients)
    for x, y in zip([*found, mine.grad], [*wanted, theirs.grad]):
        assert x.is_contiguous() and torch.equal(x, y)


def test_a_gpu_takes_a_projection_apart_by_one_kernel_each_way(monkeypatch):
    """Claim: the host launches one kernel a layer and direction, on contiguous tensors, whatever gradients it gets."""
    calls = []

    def kernel(fused, apart, cos, sin, *, join):
        assert all(x.is_contiguous() for x in (fused, *apart))
        assert [x.shape for x in apart] == [(7, 6, 8), (7, 2, 8), (7, 2, 8)]
        calls.append(join)
        for x in [fused] if join else apart:
            x.zero_()

    monkeypatch.setattr(rope, "is_on_gpu", lambda x: True)
    monkeypatch.setattr(model, "kernels", SimpleNamespace(split_and_rotate=kernel), raising=False)
    fused, angles = torch.randn(7, 2, 5, 8, requires_grad=True), torch.randn(7, 4)
    found = split_and_rotate(fused, angles.cos(), angles.sin())
    torch.autograd.backward(found, [torch.randn(x.shape[::-1]).permute(2, 1, 0) for x in found])
    assert calls == [False, True] and fused.grad.shape == fused.shape


def test_backends_that_cannot_serve_are_refused():
    """Claim: a backend is never replaced in silence by another, but ``auto`` may choose."""
    assert attend_function("auto", on_gpu=False) is sdpa.attend
    assert attend_function("sdpa", on_gpu=True) is sdpa.attend
    assert attend_function("flex", on_gpu=False) is flex.attend
    with pytest.raises(ValueError, match="attention backend flash needs .*choose model.attention_backend=sdpa"):
        attend_function("flash", on_gpu=False)
    with pytest.raises(ValueError, match="attention backend transformer_engine needs .*"):
        attend_function("transformer_engine", on_gpu=False)
    with pytest.raises(ValueError, match="unknown attention backend 'xformers'"):
        attend_function("xformers", on_gpu=False)


def test_flash_kernels_serve_half_precision_alone(monkeypatch):
    """Claim: in FP32, ``auto`` takes SDPA on a GPU too and ``flash`` is refused, by the dtype of a layer's config."""
    monkeypatch.setattr(varlen_kernels, "flash_kernel", lambda: "kernel")
    monkeypatch.setattr(attention.device, "has_gpu", lambda: True)
    with pytest.raises(ValueError, match="attention backend flash needs model.dtype bf16"):
        attend_function("flash", on_gpu=True, half_precision=False)

    def attend_of(dtype: torch.dtype, dropout: float = 0.0):
        config = TransformerConfig(
            num_layers=1, hidden_size=16, num_attention_heads=2, attention_dropout=dropout, params_dtype=dtype
        )
        groups = SimpleNamespace(tp=None, cp=None)
        return attention.SegmentAttention(config, 1, AttnMaskType.no_mask, "self", pg_collection=groups).attend

    assert attend_of(torch.float32) is sdpa.attend
    assert attend_of(torch.bfloat16) is not sdpa.attend and attend_of(torch.float16) is not sdpa.attend
    with pytest.raises(ValueError, match="segment attention has no dropout: set attention_dropout to 0"):
        attend_of(torch.float32, dropout=0.1)
