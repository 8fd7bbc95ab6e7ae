"""Layouts and shardings on their own: they move values without changing them, and put them where Megatron looks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cocoa.checkpoint.bits import same_bits
from megatron_cocoa.checkpoint.layouts import FlatKernel, Gated, GroupedQkv, InterleavedQkv, Padded, VocabularyRows
from megatron_cocoa.checkpoint.mean_row import set_mean_row
from megatron_cocoa.checkpoint.sharding import Sharding, shard, unshard

FAST = settings(max_examples=40, deadline=None)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@FAST
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_grouped_qkv_projects_as_three_projections(groups, per_group, head_dim, bias):
    """Megatron's split of the fused projection's output gives Hugging Face's q, k and v for any head counts."""
    width, tokens = 6, 5
    columns = () if bias else (width,)
    rows = (groups * per_group * head_dim, groups * head_dim, groups * head_dim)
    parts = [random(r, *columns) for r in rows]
    layout = GroupedQkv(groups, per_group, head_dim)
    fused = layout.merge(parts)
    assert fused.shape == layout.merged_shape([tuple(p.shape) for p in parts])
    x = torch.ones(tokens) if bias else random(tokens, width)

    def project(weight):
        return torch.outer(x, weight) if bias else x @ weight.T

    # Megatron-Core's SelfAttention.get_query_key_value_tensors, in plain operations.
    mixed = project(fused).view(tokens, groups, (per_group + 2) * head_dim)
    q, k, v = mixed.split([per_group * head_dim, head_dim, head_dim], dim=2)
    for found, part in zip((q, k, v), parts):
        # Each output is the same dot product of at most 6 terms; only the order of summation may differ.
        torch.testing.assert_close(found.reshape(tokens, -1), project(part), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(layout.split(fused), parts))


@FAST
@given(st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_tower_qkv_projects_as_before(heads, head_dim, bias):
    """Per-head [q, k, v] of the regrouped projection equals Hugging Face's reshape(tokens, 3, heads, d)."""
    tokens, width = 4, 3
    weight = random(3 * heads * head_dim, *(() if bias else (width,)))
    layout = InterleavedQkv(heads)
    x = torch.ones(tokens) if bias else random(tokens, width)

    def project(w):
        return torch.outer(x, w) if bias else x @ w.T

    theirs = project(weight).reshape(tokens, 3, heads, head_dim).permute(1, 0, 2, 3)
    ours = project(layout.merge([weight])).view(tokens, heads, 3 * head_dim).split(head_dim, dim=2)
    for found, needed in zip(ours, theirs):
        # As above: equal dot products of 3 terms.
        torch.testing.assert_close(found, needed, rtol=1e-6, atol=1e-6)
    assert torch.equal(layout.split(layout.merge([weight]))[0], weight)


def test_flat_kernel_equals_the_convolution():
    """The flattened patch embedding, as a matrix product, is the strided Conv3d that Hugging Face runs."""
    kernel = random(5, 3, 2, 4, 4)
    pixels = random(7, 3 * 2 * 4 * 4)
    needed = torch.nn.functional.conv3d(pixels.view(7, 3, 2, 4, 4), kernel, stride=(2, 4, 4)).view(7, 5)
    layout = FlatKernel(tuple(kernel.shape))
    # Sums of 96 products of order 1 in another order: float32 keeps about 1e-6 of the largest partial sum.
    torch.testing.assert_close(pixels @ layout.merge([kernel]).T, needed, rtol=1e-5, atol=1e-5)
    assert torch.equal(layout.split(layout.merge([kernel]))[0], kernel)


@FAST
@given(st.integers(1, 9), st.integers(0, 6))
def test_padded_gated_mlp_computes_the_same(ffn, extra):
    """Zero-padding gate, up and the columns of the next projection leaves the gated MLP's output unchanged."""
    gate, up, down, x = random(ffn, 4), random(ffn, 4), random(4, ffn), random(3, 4)
    gate_bias, up_bias = random(ffn), random(ffn) + 1
    fc1 = Gated(ffn, ffn + extra)
    fc2 = Padded(1, ffn, ffn + extra)

    def mlp(weight, bias, out):
        g, u = (x @ weight.T + bias).chunk(2, dim=-1)
        return (torch.nn.functional.silu(g) * u) @ out.T

    weight, bias, out = fc1.merge([gate, up]), fc1.merge([gate_bias, up_bias]), fc2.merge([down])
    assert weight.shape == (2 * (ffn + extra), 4) and out.shape == (4, ffn + extra)
    plain = mlp(torch.cat([gate, up]), torch.cat([gate_bias, up_bias]), down)
    # Added terms are exact zeros; a different vector width may reorder at most 15 summands.
    torch.testing.assert_close(mlp(weight, bias, out), plain, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(fc1.split(weight), (gate, up)))
    assert torch.equal(fc2.split(out)[0], down)


@pytest.mark.parametrize(
    "layout, shape, entry",
    [
        (Gated(3, 5), (10, 2), (4, 1)),
        (Gated(3, 5), (10, 2), (9, 0)),
        (Gated(3, 5), (10,), (8,)),
        (Padded(0, 3, 5), (5, 2), (3, 0)),
        (Padded(1, 3, 5), (2, 5), (1, 4)),
    ],
)
def test_padding_that_is_not_zero_is_not_removed(layout, shape, entry):
    """Trained padding would be lost by an export: it is refused, with the count."""
    tensor = torch.zeros(shape)
    layout.split(tensor)
    tensor[entry] = 1e-30
    with pytest.raises(ValueError, match="1 non-zero value"):
        layout.split(tensor)


def test_vocabulary_padding_is_dropped_whatever_it_holds():
    """Vocabulary padding depends on the layout that wrote it, so any number of rows comes off."""
    table = random(6, 2)
    layout = VocabularyRows(4, 8)
    assert torch.equal(layout.split(table)[0], table[:4])
    assert torch.equal(layout.merge([table[:4]])[4:], torch.zeros(4, 2))


@FAST
@given(
    st.sampled_from([Sharding.COLUMN, Sharding.GATED_COLUMN, Sharding.ROW, Sharding.REPLICATED]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_unshard_undoes_shard(sharding, tp_size, per_rank, dtype):
    """All ranks' parts together are the tensor, bit for bit."""
    tensor = random(2 * tp_size * per_rank, tp_size * per_rank).to(dtype)
    shards = [shard(tensor, sharding, tp_rank=r, tp_size=tp_size) for r in range(tp_size)]
    assert len({s.shape for s in shards}) == 1
    assert same_bits(unshard(shards, sharding), tensor)


def test_gated_shard_holds_matching_rows_of_gate_and_up():
    """Rank r holds rows of gate and the same rows of up: the product is local."""
    tensor = torch.arange(8)
    assert shard(tensor, Sharding.GATED_COLUMN, tp_rank=1, tp_size=2).tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize(
    "sharding, shape, message",
    [
        (Sharding.COLUMN, (6, 4), "6 entries in dimension 0 are not divisible by 4 ranks"),
        (Sharding.ROW, (4, 6), "6 entries in dimension 1 are not divisible by 4 ranks"),
        (Sharding.GATED_COLUMN, (12, 4), "6 halves of gate and up in dimension 0 are not divisible by 4 ranks"),
    ],
)
def test_indivisible_dimension_is_refused(sharding, shape, message):
    """torch.chunk would give uneven parts without a word."""
    with pytest.raises(ValueError, match=message):
        shard(torch.zeros(shape), sharding, tp_rank=0, tp_size=4)


def test_equality_is_that_of_bits():
    """Claim: NaN equals itself; zeros of two signs, dtypes and shapes differ."""
    zeros, nan = torch.zeros(2), torch.full((2,), torch.nan)
    assert same_bits(nan, nan.clone()) and same_bits(zeros, zeros.clone())
    assert not any(same_bits(zeros, other) for other in (-zeros, zeros.int(), zeros.bfloat16(), zeros[None]))


def test_replicas_that_drifted_apart_are_refused():
    """Taking rank 0's copy would hide that the ranks no longer hold one model."""
    with pytest.raises(ValueError, match=r"rank\(s\) \[1\]"):
        unshard([torch.zeros(2), torch.tensor([0.0, 1e-9])], Sharding.REPLICATED)


@pytest.mark.parametrize("row", [2, 5])
def test_mean_row_is_the_mean_of_the_other_used_rows(row):
    """The mask token starts from the mean of the table, and the table given is not written to."""
    table = random(6, 3)
    before = table.clone()
    found = set_mean_row(table, row=row, used_rows=4)
    others = [i for i in range(4) if i != row]
    # Mean of at most four numbers of order 1 in float32, summed in another order.
    torch.testing.assert_close(found[row], table[others].mean(0), rtol=1e-6, atol=1e-6)
    assert torch.equal(table, before)
    found[row] = before[row]
    assert torch.equal(found, before)


@pytest.mark.parametrize(
    "row, used, message", [(6, 4, "token id 6"), (0, 1, "used_rows is 1"), (1, 7, "used_rows is 7")]
)
def test_mean_row_outside_of_the_table_is_refused(row, used, message):
    """The table is never resized silently."""
    with pytest.raises(ValueError, match=message):
        set_mean_row(random(6, 3), row=row, used_rows=used)
