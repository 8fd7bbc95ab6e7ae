"""The batch contract refuses what would corrupt a run in silence, with the numbers."""

from dataclasses import fields, replace

import pytest
import torch

from megatron_cocoa.batch import MaskKind, PackedBatch
from megatron_cocoa.model import schedule

TOKENS = 16


def batch(**changes) -> PackedBatch:
    """Two samples of 9 and 5 tokens and a tail of 2: a picture of 2 x 4 patches in the first, bridges at 6 and 13."""
    whole = PackedBatch(
        input_ids=torch.arange(TOKENS),
        position_ids=torch.arange(TOKENS).expand(3, TOKENS),
        sample_lengths=(9, 5),
        mask_kind=MaskKind.EOS_BRIDGED,
        bridge_positions=(6, 13),
        tail_length=2,
        grid_thw=((1, 2, 4),),
        pixel_values=torch.zeros(8, 12),
        feature_positions=torch.tensor([1, 2]),
        text_positions=torch.tensor([6, 7]),
        text_labels=torch.tensor([3, 4]),
        unit_positions=torch.tensor([1]),
        unit_targets=torch.zeros(1, 48),
        embedding_positions=torch.tensor([6, 13]),
        query_rows=torch.tensor([0]),
        target_rows=torch.tensor([1]),
    )
    return replace(whole, **changes)


NEGATIVES = dict(
    target_keys=torch.tensor([5]), negative_rows=torch.tensor([[1, -1]]), negative_keys=torch.tensor([[6, 0]])
)


def test_a_whole_batch_passes():
    """Claim: the checks refuse nothing that fits together, with pixels or (on later stages) without."""
    batch().validate(spatial_merge_size=2)
    batch(pixel_values=None).validate(spatial_merge_size=2)
    text = dict(grid_thw=(), pixel_values=None, feature_positions=None, unit_positions=None, unit_targets=None)
    batch(mask_kind=MaskKind.CAUSAL, bridge_positions=(), **text).validate(spatial_merge_size=2)
    batch(mask_kind=MaskKind.BIDIRECTIONAL, bridge_positions=(None, 13)).validate(spatial_merge_size=2)
    batch(unit_targets=None, deferred=lambda: {}).validate(spatial_merge_size=2)
    batch(unit_patches=torch.ones(1, 4, dtype=torch.bool)).validate(spatial_merge_size=2)
    batch(**NEGATIVES).validate(spatial_merge_size=2)


REFUSED = [
    (dict(sample_lengths=(9, 4)), "sum to 13 and the tail has 2, but the pack has 16 tokens"),
    (dict(tail_length=0), "sum to 14 and the tail has 0, but the pack has 16 tokens"),
    (dict(sample_lengths=(14, 0), bridge_positions=(6, 13)), r"at least one token, found lengths \(14, 0\)"),
    (dict(tail_length=-1, sample_lengths=(9, 8)), "at least one token"),
    (dict(position_ids=torch.zeros(3, 15)), r"shape \(3, 15\), needed \(3, 16\)"),
    (dict(position_ids=torch.zeros(1, 16)), r"shape \(1, 16\), needed \(3, 16\)"),
    (dict(bridge_positions=(6,)), "1 bridge positions for 2 samples"),
    (dict(bridge_positions=(6, 13, 13)), "3 bridge positions for 2 samples"),
    (dict(bridge_positions=()), "0 bridge positions for 2 samples"),
    (dict(bridge_positions=(6, None)), "sample 1 has no bridge, and mask kind eos_bridged needs one"),
    (dict(bridge_positions=(6, 8)), r"sample 1 spans rows \[9, 14\), its bridge is at 8"),
    (dict(bridge_positions=(9, 13)), r"sample 0 spans rows \[0, 9\), its bridge is at 9"),
    (dict(bridge_positions=(6, 14)), r"sample 1 spans rows \[9, 14\), its bridge is at 14"),
    (dict(pixel_values=torch.zeros(6, 12)), r"pixel_values has 6 patches, the grids \(\(1, 2, 4\),\) need 8"),
    (dict(grid_thw=((1, 2, 3),)), r"grid \(1, 2, 3\) has a side that spatial_merge_size 2 does not divide"),
    (dict(grid_thw=((0, 2, 4),)), r"grid \(0, 2, 4\)"),
    (dict(grid_thw=()), r"pixel_values has 8 patches, the grids \(\) need 0"),
    (dict(feature_positions=torch.tensor([1])), "1 image placeholder tokens for 2 image features: truncation"),
    (dict(feature_positions=torch.tensor([1, 2, 3])), "3 image placeholder tokens for 2 image features"),
    (dict(feature_positions=None), "0 image placeholder tokens for 2 image features"),
    (dict(text_labels=None), r"text_positions and text_labels must come together .* found \(2, None\)"),
    (dict(text_labels=torch.tensor([3])), r"text_positions and text_labels .* found \(2, 1\)"),
    (dict(unit_positions=None), r"unit_positions and unit_targets .* found \(None, 1\)"),
    (dict(unit_targets=None), r"unit_positions and unit_targets .* found \(1, None\)"),
    (dict(unit_patches=torch.ones(2, 4)), r"unit_patches has shape \(2, 4\), needed \(1, 4\)"),
    (dict(unit_patches=torch.ones(1, 3)), r"unit_patches has shape \(1, 3\), needed \(1, 4\)"),
    (dict(target_rows=None), r"query_rows and target_rows .* found \(1, None\)"),
    (dict(text_positions=torch.tensor([6, 16])), r"text_positions spans \[6, 16\], the pack has rows \[0, 16\)"),
    (dict(embedding_positions=torch.tensor([-1, 6])), r"embedding_positions spans \[-1, 6\]"),
    (dict(feature_positions=torch.tensor([1, 40])), r"feature_positions spans \[1, 40\]"),
    (NEGATIVES | dict(negative_keys=None), r"negative_rows and negative_keys .* found \(1, None\)"),
    (NEGATIVES | dict.fromkeys(("query_rows", "target_rows")), r"negative_rows has shape \(1, 2\), needed \(0, hard"),
    (NEGATIVES | dict(negative_rows=torch.tensor([1])), r"negative_rows has shape \(1,\), needed \(1, hard_neg"),
    (NEGATIVES | dict(target_keys=None), "negative_rows come without target_keys"),
    (NEGATIVES | dict(negative_rows=torch.tensor([[0, 2]])), "negative_rows names row 2 of 2 embeddings"),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_parts_that_do_not_fit_are_refused(changes, message):
    """Claim: each mismatch is an error that says what was found and what was needed."""
    with pytest.raises(ValueError, match=message):
        batch(**changes).validate(spatial_merge_size=2)


def test_a_batch_for_a_gpu_is_cast_and_staged_whole(monkeypatch):
    """Claim: what the device needs is pinned, also deferred tensors that are read; pixels travel at half their size."""
    pinned = []
    monkeypatch.setattr(schedule.device, "staged", lambda x, target: pinned.append(x) or x)
    whole = batch()
    deferring = replace(whole, pixel_values=None, deferred=lambda: {"pixel_values": whole.pixel_values})
    how = dict(dtype=torch.bfloat16, target=torch.device("cuda", 1))
    made = schedule._prepared(deferring, reads_floats=True, **how)
    assert made.deferred is None and torch.equal(made.pixel_values, whole.pixel_values.bfloat16())
    tensors = {f.name for f in fields(whole) if isinstance(getattr(whole, f.name), torch.Tensor)}
    assert len(pinned) == len(tensors - {"text_positions", "unit_positions", "embedding_positions"})
    assert {x.dtype for x in pinned} == {torch.bfloat16, torch.int64}
    assert schedule._prepared(deferring, reads_floats=False, **how).pixel_values is None


def test_moving_casts_floating_point_alone():
    """Claim: precision is chosen for pixels and targets; ids and rows stay integers."""
    moved = batch().to("cpu", dtype=torch.bfloat16)
    assert moved.pixel_values.dtype == moved.unit_targets.dtype == torch.bfloat16
    assert moved.input_ids.dtype == moved.feature_positions.dtype == torch.int64
    assert moved.grid_thw == batch().grid_thw and moved.num_tokens == TOKENS and moved.num_patches == 8


def test_rows_that_ranks_share_out_stay_on_the_host():
    """Claim: a context-parallel rank counts its rows of each head without asking the device."""
    moved = batch().to("meta")
    assert moved.input_ids.is_meta and moved.text_labels.is_meta
    assert not any(x.is_meta for x in (moved.text_positions, moved.unit_positions, moved.embedding_positions))
