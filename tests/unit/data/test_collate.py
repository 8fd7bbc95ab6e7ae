"""A pack holds exactly what its samples hold, at the right rows, with noise where units are masked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_cocoa.batch import MaskKind
from megatron_cocoa.data import collate
from megatron_cocoa.data.collate import collate_bridge, collate_contrastive, collate_embedding, collate_warmup
from megatron_cocoa.data.evaluation_batches import bridge_batches, embedding_batch, evaluation_builder
from megatron_cocoa.data.prepared import CorruptionSettings
from megatron_cocoa.data.rows import CaptionRow, Content, PairRow

SETTINGS = CorruptionSettings(seed=5, text_mask_ratio=0.5, unit_mask_ratio=0.5)
PICTURES = [Content("<|image_1|>", f"images/{i}.png") for i in range(4)]
CLEAN = CorruptionSettings(seed=5, text_mask_ratio=0.5)


@pytest.fixture
def parts(data_folder, model_folder, vision, bundle):
    return evaluation_builder(
        data_folder, model_path=model_folder, bundle=bundle, vision=vision, max_length=256, image_size=70
    )


def warmup_samples(builder, n=3):
    rows = [CaptionRow(f"r{i}", f"images/{i}.png", "red cat " * (i + 1)) for i in range(n)]
    return [builder.warmup(row, SETTINGS, epoch=0) for row in rows]


def test_warmup_pack_masks_pixels_before_the_tower_and_keeps_them_as_targets(parts, vision):
    builder, options = parts
    samples = warmup_samples(builder)
    batch = collate_warmup(samples, options)
    pixels = options.pictures.patches([p for s in samples for p in s.pictures])
    clean = torch.from_numpy(pixels).view(-1, vision.unit_dim)
    units = batch.pixel_values.view(-1, vision.unit_dim)
    masked = np.concatenate([25 * i + s.masked_units for i, s in enumerate(samples)])
    kept = np.setdiff1d(np.arange(75), masked)
    assert torch.equal(units[kept], clean[kept]) and torch.equal(batch.unit_targets, clean[masked])
    noise = np.concatenate([s.unit_noise.draw(vision.unit_dim, patch_dim=vision.patch_dim) for s in samples])
    assert torch.equal(units[masked], torch.from_numpy(noise))
    assert torch.equal(batch.unit_positions, batch.feature_positions[masked])
    assert batch.mask_kind is MaskKind.BIDIRECTIONAL and batch.bridge_positions == (None, None, None)


def test_packed_rows_are_the_samples_rows(parts, bundle):
    builder, options = parts
    samples = warmup_samples(builder)
    batch = collate_warmup(samples, options)
    start = 0
    for index, sample in enumerate(samples):
        rows = slice(start, start + sample.input_ids.size)
        np.testing.assert_array_equal(batch.input_ids[rows], sample.input_ids)
        np.testing.assert_array_equal(batch.position_ids[:, rows], sample.position_ids)
        assert batch.sample_lengths[index] == sample.input_ids.size
        start = rows.stop
    assert start == batch.num_tokens
    assert (batch.input_ids[batch.feature_positions] == bundle.image_token_id).all()
    assert (batch.input_ids[batch.text_positions + 1] == bundle.mask_token_id).all()
    assert batch.text_labels.tolist() == np.concatenate([s.text_labels for s in samples]).tolist()


def test_ranks_without_tower_or_decoder_count_the_same_units(parts, vision):
    builder, options = parts
    whole = collate_warmup(warmup_samples(builder), options)
    first = collate_warmup(warmup_samples(builder), replace(options, needs_unit_targets=False))
    last = collate_warmup(warmup_samples(builder), replace(options, needs_pixels=False))
    middle = collate_warmup(warmup_samples(builder), replace(options, needs_pixels=False, needs_unit_targets=False))
    for batch in (first, last, middle):
        assert torch.equal(batch.unit_positions, whole.unit_positions)
        assert torch.equal(batch.feature_positions, whole.feature_positions)
    assert torch.equal(first.pixel_values, whole.pixel_values) and first.unit_targets.shape[1] == 0
    assert torch.equal(last.unit_targets, whole.unit_targets) and last.pixel_values is None
    assert middle.pixel_values is None and middle.unit_targets.shape == (whole.unit_positions.numel(), 0)


def test_normalised_targets_leave_the_pixels_alone(parts, vision):
    builder, options = parts
    plain = collate_warmup(warmup_samples(builder), options)
    normal = collate_warmup(warmup_samples(builder), replace(options, normalize_unit_targets=True))
    assert torch.equal(plain.pixel_values, normal.pixel_values)
    # Mean of 294 float32 values near 1: rounding only.
    assert normal.unit_targets.view(-1, vision.patch_dim).mean(1).abs().max() < 1e-5


@pytest.mark.parametrize("mask_kind", [MaskKind.EOS_BRIDGED, MaskKind.EOS_BRIDGED_STRICT])
def test_bridge_pack_records_each_bridge(parts, bundle, mask_kind):
    builder, options = parts
    blocks = [builder.bridge_blocks(f"r{i}", c, "red cat", CLEAN, epoch=0) for i, c in enumerate(PICTURES)]
    batch = collate_bridge([builder.join_blocks(b) for b in blocks], options, mask_kind=mask_kind)
    assert batch.mask_kind is mask_kind and batch.unit_positions is None and batch.embedding_positions is None
    assert (batch.input_ids[list(batch.bridge_positions)] == bundle.bridge_token_id).all()


def test_contrastive_pack_lays_pairs_next_to_each_other(parts):
    builder, options = parts
    rows = [PairRow(f"r{i}", picture, Content(f"cat {i}")) for i, picture in enumerate(PICTURES)]
    batch = collate_contrastive([sample for row in rows for sample in builder.pair(row)], options)
    assert batch.sample_ids == tuple(f"r{i}#{side}" for i in range(4) for side in ("query", "target"))
    assert batch.negative_rows is None and batch.negative_keys is None
    assert batch.query_rows.tolist() == [0, 2, 4, 6] and batch.target_rows.tolist() == [1, 3, 5, 7]
    assert batch.embedding_positions.tolist() == list(batch.bridge_positions)
    assert batch.text_positions is None and batch.unit_positions is None


def test_tail_fills_to_a_multiple_and_further(parts, bundle):
    builder, options = parts
    samples = [builder.embedding("a", Content("red cat dog"))]
    used = samples[0].input_ids.size
    multiple = collate_embedding(samples, replace(options, pad_to_multiple_of=8))
    assert multiple.num_tokens % 8 == 0 and multiple.tail_length == -used % 8
    further = multiple.filled_to(64, pad_token_id=bundle.pad_token_id)
    assert further.num_tokens == 64 and further.tail_length == 64 - used
    assert (further.input_ids[used:] == bundle.pad_token_id).all()
    assert further.position_ids[:, used:].tolist() == [list(range(64 - used))] * 3
    further.validate(spatial_merge_size=2)


def test_embedding_batches_keep_every_item_in_order(parts, bundle):
    builder, options = parts
    contents = [*PICTURES, *(Content(f"cat {i}") for i in range(5))]
    batches = [
        embedding_batch(contents[first : first + 4], builder=builder, options=options, first=first)
        for first in range(0, len(contents), 4)
    ]
    assert [b.embedding_positions.numel() for b in batches] == [4, 4, 1]
    assert batches[1].pixel_values is None and batches[1].grid_thw == ()
    for batch in batches:
        assert (batch.input_ids[batch.embedding_positions] == bundle.bridge_token_id).all()
    with pytest.raises(ValueError, match="neither_text_nor_image"):
        embedding_batch([Content("")], builder=builder, options=options)


def test_swapping_changes_block_a_alone(parts):
    builder, options = parts
    rows = [PairRow(f"r{i}", picture, Content("red cat dog")) for i, picture in enumerate(PICTURES)]
    kwargs = {"builder": builder, "options": options, "corruption": CLEAN, "mask_kind": MaskKind.EOS_BRIDGED}
    own, other = (list(bridge_batches(rows, batch_size=2, swapped=s, **kwargs)) for s in (False, True))
    pixels = torch.cat([b.pixel_values for b in own])
    assert torch.equal(torch.cat([b.pixel_values for b in other]), pixels.roll(-100, dims=0))
    for a, b in zip(own, other):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.text_labels, b.text_labels)
        assert torch.equal(a.text_positions, b.text_positions) and a.sample_ids == b.sample_ids


def test_target_keys_are_equal_exactly_where_targets_are_equal(parts):
    """Text and pixels both count; the sample's name and its place in the pack do not."""
    builder, options = parts
    targets = [Content("red cat"), Content("red dog"), Content("red cat"), PICTURES[0], PICTURES[1], PICTURES[0]]
    rows = [PairRow(f"{i}", Content("query"), target) for i, target in enumerate(targets)]
    keys = collate_contrastive([sample for row in rows for sample in builder.pair(row)], options).target_keys
    assert keys.dtype == torch.int64
    equal = (keys[:, None] == keys[None, :]).tolist()
    assert equal == [[a == b for b in targets] for a in targets]


def test_pictures_of_queries_are_not_hashed(parts, monkeypatch):
    """Claim: keys, which take a millisecond a picture, are made of what is compared alone."""
    builder, options = parts
    hashed = []
    monkeypatch.setattr(collate, "_content_key", lambda sample: hashed.append(sample.role) or 0)
    samples = builder.pair(PairRow("a", PICTURES[0], Content("t")), [Content("n")])
    collate_contrastive(samples, options, num_hard_negatives=1)
    assert hashed == ["target", "negative"]


def test_hard_negatives_have_a_place_each_and_keys_like_targets(parts):
    """Claim: a pair's negatives lie in its own line, missing ones are -1, and equal contents have equal keys."""
    builder, options = parts
    cat, dog = Content("red cat"), Content("red dog")
    rows = [PairRow("a", Content("q"), cat), PairRow("b", Content("q"), dog), PairRow("c", Content("q"), PICTURES[0])]
    chosen = [[dog, PICTURES[0]], [], [cat]]
    samples = [sample for row, negatives in zip(rows, chosen) for sample in builder.pair(row, negatives)]
    batch = collate_contrastive(samples, options, num_hard_negatives=2)
    assert batch.query_rows.tolist() == [0, 4, 6] and batch.target_rows.tolist() == [1, 5, 7]
    assert batch.negative_rows.tolist() == [[2, 3], [-1, -1], [8, -1]]
    assert batch.embedding_positions.numel() == 9 and batch.grid_thw == ((1, 10, 10),) * 2
    targets, negatives = batch.target_keys.tolist(), batch.negative_keys.tolist()
    assert negatives == [[targets[1], targets[2]], [0, 0], [targets[0], 0]]


@pytest.mark.parametrize("needs", [{}, {"needs_pixels": False}, {"needs_unit_targets": False}])
def test_deferred_floats_are_those_that_would_have_been_made_at_once(parts, needs):
    """Claim: deferring changes when floats are made and nothing else, noise and targets of masked units included."""
    builder, options = parts
    samples, options = warmup_samples(builder), replace(options, **needs)
    at_once = collate_warmup(samples, options)
    deferred = collate_warmup(samples, replace(options, defer_floats=True))
    assert deferred.pixel_values is None and deferred.unit_targets is None and deferred.num_tokens == at_once.num_tokens
    assert torch.equal(deferred.unit_positions, at_once.unit_positions)
    for _ in range(2):
        made = deferred.to("cpu")
        assert made.deferred is None
        for name in ("pixel_values", "unit_targets"):
            found, wanted = getattr(made, name), getattr(at_once, name)
            assert (found is None) == (wanted is None) and (found is None or torch.equal(found, wanted)), name
    poisoned = replace(deferred, pixel_values=torch.full((300, 1), float("nan")))
    assert torch.isnan(poisoned.to("cpu").pixel_values).all(), "what is set already stays"
