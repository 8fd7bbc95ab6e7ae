"""The rows of the method's decision table that change what data looks like, each against its plain definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_cocoa.batch import MaskKind
from megatron_cocoa.config import EmbeddingForm
from megatron_cocoa.data.collate import collate_contrastive, collate_embedding, collate_warmup
from megatron_cocoa.data.evaluation_batches import evaluation_builder
from megatron_cocoa.data.prepared import CorruptionSettings
from megatron_cocoa.data.rows import CaptionRow, Content, PairRow

SETTINGS = CorruptionSettings(seed=5, text_mask_ratio=0.5, unit_mask_ratio=0.4)
PICTURE = Content("look <|image_1|> here", "images/0.png")


@pytest.fixture
def make(data_folder, model_folder, vision, bundle):
    def parts(form=EmbeddingForm()):
        return evaluation_builder(
            data_folder, model_path=model_folder, bundle=bundle, vision=vision, max_length=256, image_size=70, form=form
        )

    return parts


def rows_masked(builder, caption: str, eligible_tokens: str) -> set[int]:
    """Rows that any of many draws masks."""
    settings = replace(SETTINGS, eligible_tokens=eligible_tokens)
    row = CaptionRow("r", "images/0.png", caption)
    draws = [builder.warmup(row, settings, epoch=epoch) for epoch in range(40)]
    assert {draw.num_eligible for draw in draws} == {draws[0].num_eligible}
    return {int(i) + 1 for draw in draws for i in draw.text_rows}


def test_eligible_tokens_are_those_that_the_setting_names(make, bundle):
    """Claim: words leave punctuation out, all_but_image takes the mark behind the picture in, nothing takes a pad."""
    builder, _ = make()
    caption = "red cat, dog! (house) -- moon."
    ids = builder.warmup(CaptionRow("r", "images/0.png", caption), replace(SETTINGS, text_mask_ratio=1e-9,
                         mask_at_least_one=False), epoch=0).input_ids  # fmt: skip
    text = set(range(27, ids.size))
    words = {i for i in text if any(c.isalnum() for c in bundle.tokenizer.decode([int(ids[i])]))}
    assert words and words != text
    assert rows_masked(builder, caption, "non_special") == text
    assert rows_masked(builder, caption, "words") == words
    # The mark before the picture is row 0, which nothing could predict.
    assert rows_masked(builder, caption, "all_but_image") == text | {26}


def test_words_hold_parts_of_characters_and_no_control_token(bundle):
    """Claim: letters that a byte-level token holds a part of count, and the tables of both settings do not overlap."""
    ids = np.arange(bundle.vocab_size)
    assert not (bundle.is_word(ids) & bundle.is_special(ids)).any()
    assert bundle.is_word(bundle.encode_text("straße")).any()
    assert not bundle.is_word(bundle.encode_text("?!,.")).any()


def test_patches_are_hidden_each_by_itself(make, vision):
    """Claim: under ``patch`` noise lies over the hidden patches alone, all pixels of whole units are the targets, and
    the batch says which of their patches were hidden."""
    builder, options = make()
    by_patch = replace(SETTINGS, by_patch=True)
    rows = [CaptionRow(f"r{i}", f"images/{i}.png", "red cat") for i in range(3)]
    samples = [builder.warmup(row, by_patch, epoch=0) for row in rows]
    # A pack may hold things without any picture.
    samples.insert(1, builder.embedding("t", Content("a text")))
    batch = collate_warmup(samples, options)
    clean = torch.from_numpy(options.pictures.patches([p for s in samples for p in s.pictures]))
    hidden = np.concatenate(
        [100 * i + s.masked_patches for i, s in enumerate(s for s in samples if s.pictures)]
    )
    assert 0.3 < hidden.size / 300 < 0.5
    changed = (batch.pixel_values != clean).any(dim=1).nonzero().squeeze(1)
    assert changed.tolist() == hidden.tolist()
    sizes = dict(unit_dim=vision.patch_dim, patch_dim=vision.patch_dim)
    noise = np.concatenate([s.unit_noise.draw(**sizes) for s in samples if s.pictures])
    assert torch.equal(batch.pixel_values[hidden], torch.from_numpy(noise))
    units = np.unique(hidden // vision.patches_per_unit)
    assert torch.equal(batch.unit_positions, batch.feature_positions[units])
    assert torch.equal(batch.unit_targets, clean.view(-1, vision.unit_dim)[units])
    wanted = [[4 * u + p in set(hidden.tolist()) for p in range(4)] for u in units.tolist()]
    assert batch.unit_patches.tolist() == wanted
    deferred = collate_warmup(samples, replace(options, defer_floats=True))
    assert torch.equal(deferred.unit_patches, batch.unit_patches)
    assert torch.equal(deferred.materialized().pixel_values, batch.pixel_values)


def test_the_mean_of_a_hidden_patch_is_its_own(make, vision):
    """Claim: ``mean`` under ``patch`` is taken over one patch and not over its unit."""
    builder, options = make()
    settings = replace(SETTINGS, by_patch=True, mae_noise="mean")
    sample = builder.warmup(CaptionRow("r", "images/0.png", "red cat"), settings, epoch=0)
    batch = collate_warmup([sample], options)
    clean = options.pictures.patches(list(sample.pictures)).reshape(-1, vision.in_channels, vision.patch_dim // 3)
    wanted = clean.mean(axis=2, keepdims=True).repeat(clean.shape[2], axis=2)[sample.masked_patches]
    found = batch.pixel_values.numpy().reshape(clean.shape)[sample.masked_patches]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_bare_picture_is_its_pads_and_has_the_positions_of_text(make, bundle):
    """Claim: no mark stands around the pads, and positions count one a token on all three axes."""
    (full, _), (bare, options) = make(), make(EmbeddingForm(image_placeholder="bare"))
    sample, with_marks = bare.embedding("a", PICTURE), full.embedding("a", PICTURE)
    marks = (bundle.vision_start_token_id, bundle.vision_end_token_id)
    assert sample.input_ids.tolist() == [i for i in with_marks.input_ids.tolist() if i not in marks]
    n = sample.input_ids.size
    np.testing.assert_array_equal(sample.position_ids, np.broadcast_to(np.arange(n), (3, n)))
    assert not np.array_equal(with_marks.position_ids[0], with_marks.position_ids[1])
    assert sample.feature_rows.size == 25 and sample.bridge == n - 1
    for builder in (full, bare):
        assert builder.measure(PICTURE).tokens == builder.embedding("a", PICTURE).input_ids.size
    collate_embedding([sample], options)


def test_attention_of_embeddings_follows_the_form(make):
    """Claim: pairs and evaluation are packed for the attention of the form."""
    for attention in ("causal", "bidirectional"):
        builder, options = make(EmbeddingForm(attention=attention))
        pair = builder.pair(PairRow("r", PICTURE, Content("a red cat")))
        assert collate_contrastive(pair, options).mask_kind is MaskKind(attention)
        assert collate_embedding([builder.embedding("a", PICTURE)], options).mask_kind is MaskKind(attention)
