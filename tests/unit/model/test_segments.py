"""Segment tables: every mask kind is the dense mask of its definition; tables with holes are refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cocoa.batch import MaskKind
from megatron_cocoa.model.segments import SEGMENT_RULES, SegmentTable, compile_segments
from tests.parity.masks import dense_mask


@st.composite
def packs(draw):
    """Lengths, bridges and tail. A bridge is often a sample's first or last row: then block A or block B is empty."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    bridges, start = [], 0
    for length in lengths:
        bridges.append(start + draw(st.one_of(st.just(0), st.just(length - 1), st.integers(0, length - 1))))
        start += length
    return lengths, bridges, draw(st.integers(0, 4))


def mask_of(table: SegmentTable) -> torch.Tensor:
    """The table as a dense mask, from its segments alone."""
    mask = torch.zeros(table.length, table.length, dtype=torch.bool)
    for (q_start, q_end, k_start, k_end), causal in zip(table.rows.tolist(), table.causal.tolist()):
        for row in range(q_start, q_end):
            mask[row, k_start : k_start + row - q_start + 1 if causal else k_end] = True
    return mask


@given(kind=st.sampled_from(MaskKind), pack=packs())
def test_every_kind_is_the_dense_mask_of_its_definition(kind, pack):
    """Claim: for any lengths, bridges and tail, the segments are exactly the mask that ``MaskKind`` writes down."""
    lengths, bridges, tail = pack
    table = compile_segments(kind, lengths, bridges, tail)
    wanted = dense_mask(kind, lengths, bridges, tail)
    assert torch.equal(mask_of(table), wanted)
    low, high = table.key_ranges()
    columns = np.arange(table.length)
    assert np.array_equal((low[:, None] <= columns) & (columns < high[:, None]), wanted.numpy())
    assert table.num_score_entries() == int(wanted.sum())
    assert table.length == sum(lengths) + tail


def test_every_kind_has_a_rule():
    """Claim: a mask kind is its segments and nothing else; a kind without a rule does not exist."""
    assert set(SEGMENT_RULES) == set(MaskKind)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), causal=st.booleans())
def test_blocks_from_lengths(lengths, causal):
    """Claim: windows and frames are packs of samples that see themselves."""
    kind = MaskKind.CAUSAL if causal else MaskKind.BIDIRECTIONAL
    assert torch.equal(mask_of(SegmentTable.from_lengths(lengths, causal=causal)), dense_mask(kind, lengths))


def test_the_collaborative_mask_costs_what_it_should():
    """Claim: a^2 + b^2 + n pairs and not n^2, A and B each counted with the bridge that they see."""
    a, b = 700, 300
    table = compile_segments(MaskKind.EOS_BRIDGED, [a + 1 + b], [a])
    assert table.num_score_entries() == a * (a + 1) + (a + 1 + b) + b * (b + 1)
    assert len(table.rows) == 3


@pytest.mark.parametrize(
    "length, rows, message",
    [
        (4, [(0, 3, 0, 3, False)], r"\[\[0, 3\]\] do not cover each of 4 rows once"),
        (4, [(0, 3, 0, 3, False), (2, 4, 0, 4, False)], r"\[\[0, 3\], \[2, 4\]\] do not cover each of 4 rows once"),
        (4, [(0, 2, 0, 2, False), (3, 4, 0, 4, False)], "do not cover each of 4 rows once"),
        (3, [(0, 4, 0, 3, False)], "do not cover each of 3 rows once"),
        (3, [(0, 3, 0, 5, False)], r"outside of \[0, 3\): \[\[0, 3, 0, 5\]\]"),
        (3, [(0, 3, -1, 2, False)], r"outside of \[0, 3\)"),
        (3, [(0, 3, 2, 2, False)], "queries but no keys"),
        (3, [(0, 3, 0, 2, True)], "as many keys as queries"),
    ],
)
def test_tables_that_do_not_cover_their_rows_are_refused(length, rows, message):
    """Claim: a table with a hole, an overlap or foreign keys never reaches a kernel."""
    with pytest.raises(ValueError, match=message):
        SegmentTable.from_rows(length, rows)


@pytest.mark.parametrize(
    "bridges, message",
    [
        ([2], "1 bridge positions for 2 samples"),
        ([2, None], r"sample 1 spans rows \[4, 9\), its bridge is None"),
        ([4, 5], r"sample 0 spans rows \[0, 4\), its bridge is 4"),
        ([], r"sample 0 spans rows \[0, 4\), its bridge is None"),
    ],
)
@pytest.mark.parametrize("kind", [MaskKind.EOS_BRIDGED, MaskKind.EOS_BRIDGED_STRICT])
def test_missing_and_foreign_bridges_are_refused(kind, bridges, message):
    """Claim: a bridged mask needs the bridge of each sample inside of that sample."""
    with pytest.raises(ValueError, match=message):
        compile_segments(kind, [4, 5], bridges)
