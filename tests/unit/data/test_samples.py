"""Each stage's token layout: where the picture, the bridge and the labels are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_cocoa.data.decode import PictureError
from megatron_cocoa.data.positions import VisionSegment, mrope_positions
from megatron_cocoa.data.prepared import CorruptionSettings, swap_blocks
from megatron_cocoa.data.preprocess import PictureLoader, load_processor
from megatron_cocoa.data.rows import CaptionRow, Content
from megatron_cocoa.data.samples import SampleBuilder

HALF = CorruptionSettings(seed=5, text_mask_ratio=0.5, unit_mask_ratio=0.5)
PICTURE = Content("look <|image_1|> here", "images/0.png")


@pytest.fixture
def build(data_folder, model_folder, vision, bundle):
    def make(max_length=256):
        pictures = PictureLoader(data_folder, processor=load_processor(model_folder), vision=vision, image_size=70)
        return SampleBuilder(bundle=bundle, vision=vision, pictures=pictures, max_length=max_length)

    return make


def unmask(sample):
    ids = sample.input_ids.copy()
    ids[sample.text_rows + 1] = sample.text_labels
    return ids


def test_warmup_is_picture_then_caption_without_bridge(build, bundle):
    caption = "red cat casa"
    sample = build().warmup(CaptionRow("r", "images/0.png", caption), HALF, epoch=0)
    expected = [bundle.vision_start_token_id, *[bundle.image_token_id] * 25, bundle.vision_end_token_id]
    assert unmask(sample).tolist() == expected + bundle.encode_text(caption).tolist()
    assert sample.bridge is None and sample.grid_thw == ((1, 10, 10),)
    assert sample.feature_rows.tolist() == list(range(1, 26))
    assert sample.num_eligible == bundle.encode_text(caption).size


def test_labels_stand_one_row_before_the_masked_token(build, bundle):
    builder = build()
    for epoch in range(20):
        sample = builder.warmup(CaptionRow("r", "images/1.png", "small dog house"), HALF, epoch=epoch)
        masked = np.flatnonzero(sample.input_ids == bundle.mask_token_id)
        np.testing.assert_array_equal(sample.text_rows, masked - 1)
        assert masked.size >= 1 and not bundle.is_special(sample.text_labels).any()


def test_masks_change_with_epoch_and_sample_and_repeat_within_them(build):
    """Claim: in both stages, for words and for pictures, so that no two samples of a step are hidden alike."""
    builder, words = build(), "red green blue small large cat dog house tree moon"
    for stage in ("warmup", "bridge"):
        draws = []
        for name, epoch in (("r", 0), ("r", 0), ("r", 1), ("s", 0)):
            if stage == "warmup":
                sample = builder.warmup(CaptionRow(name, "images/0.png", words), HALF, epoch=epoch)
            else:
                sample = builder.join_blocks(builder.bridge_blocks(name, PICTURE, words, HALF, epoch=epoch))
            noise = sample.unit_noise.draw(builder.vision.unit_dim, patch_dim=builder.vision.patch_dim)
            draws.append((sample.text_rows.tolist(), sample.masked_units.tolist(), float(noise[0, 0])))
        for first, again, *others in zip(*draws):
            assert first == again and first not in others and others[0] != others[1]


def test_shared_noise_is_that_of_the_step(build):
    """Claim: samples of one step have it in common, and another step has another."""
    builder, shared = build(), replace(HALF, mae_noise="shared")

    def noise(name: str, step: int) -> np.ndarray:
        sample = builder.warmup(CaptionRow(name, "images/0.png", "red cat"), shared, epoch=0, step=step)
        return sample.unit_noise.draw(builder.vision.unit_dim, patch_dim=builder.vision.patch_dim)[0]

    np.testing.assert_array_equal(noise("r", 8), noise("s", 8))
    assert (noise("r", 8) != noise("r", 16)).any()


def test_masking_never_changes_the_cached_text(build, bundle):
    before = bundle.encode_text("gato rojo").copy()
    everything = CorruptionSettings(seed=1, text_mask_ratio=1.0)
    builder = build()
    builder.warmup(CaptionRow("r", "images/0.png", "gato rojo"), everything, epoch=0)
    builder.bridge_blocks("r", PICTURE, "gato rojo", everything, epoch=0)
    np.testing.assert_array_equal(bundle.encode_text("gato rojo"), before)


def test_bridge_sample_is_a_bridge_b_with_one_position_index(build, bundle, vision):
    builder = build()
    blocks = builder.bridge_blocks("r", PICTURE, "a cat", HALF, epoch=0)
    sample = builder.join_blocks(blocks)
    target = bundle.encode_text("a cat")
    assert unmask(sample)[sample.bridge + 1 :].tolist() == target.tolist()
    assert sample.input_ids[sample.bridge] == bundle.bridge_token_id
    before, after = bundle.encode_text("look ").size, bundle.encode_text(" here").size
    segments = (before + 1, VisionSegment((1, 10, 10)), 1 + after + 1 + target.size)
    expected = mrope_positions(segments, spatial_merge_size=2, tokens_per_second=vision.tokens_per_second)
    np.testing.assert_array_equal(sample.position_ids, expected)


def test_labels_of_a_bridge_sample_lie_in_block_b_and_the_bridge_predicts_its_first_token(build, bundle):
    everything = CorruptionSettings(seed=1, text_mask_ratio=1.0)
    builder = build()
    sample = builder.join_blocks(builder.bridge_blocks("r", PICTURE, "a small cat", everything, epoch=0))
    target = bundle.encode_text("a small cat")
    assert sample.text_rows.tolist() == list(range(sample.bridge, sample.bridge + target.size))
    assert sample.text_labels.tolist() == target.tolist()
    assert not (sample.input_ids[: sample.bridge] == bundle.mask_token_id).any()


def test_embedding_sample_ends_with_the_bridge(build, bundle):
    builder = build()
    text = builder.embedding("t", Content("red cat"))
    assert text.input_ids.tolist() == [*bundle.encode_text("red cat").tolist(), bundle.bridge_token_id]
    assert text.bridge == len(text.input_ids) - 1 and text.pictures == () and text.position_ids[0, -1] == text.bridge
    picture = builder.embedding("p", Content("<|image_1|>", "images/0.png"))
    assert picture.input_ids.size == 28 and picture.bridge == 27


def test_a_typed_bridge_token_does_not_move_the_bridge(build, bundle):
    sample = build().embedding("t", Content("a <|im_end|> b"))
    assert np.flatnonzero(sample.input_ids == bundle.bridge_token_id).tolist() == [sample.bridge]


def test_long_texts_are_cut_and_pictures_never(build, bundle):
    long_text = "red green blue small large cat dog house " * 6
    builder = build(max_length=40)
    warm = builder.warmup(CaptionRow("r", "images/0.png", long_text), HALF, epoch=0)
    joined = builder.join_blocks(
        builder.bridge_blocks("r", Content("<|image_1|>" + long_text, "images/0.png"), long_text, HALF, epoch=0)
    )
    embedded = builder.embedding("e", Content(long_text + "<|image_1|>", "images/0.png"))
    text = bundle.encode_text(long_text).size
    # The picture and its marks take 27 tokens.
    for sample, whole in ((warm, 27 + text), (joined, 27 + text + 1 + text), (embedded, 27 + text + 1)):
        assert sample.input_ids.size == 40 and (sample.input_ids == bundle.image_token_id).sum() == 25
        assert sample.num_cut == whole - 40 and sample.position_ids.shape == (3, 40)
    assert joined.bridge == 27 + 6, "of the 12 places that the picture and the bridge leave, each block keeps half"
    assert embedded.input_ids[-1] == bundle.bridge_token_id


def test_a_short_block_b_leaves_its_room_to_block_a(build, bundle):
    long_text = "red green blue small large cat dog house " * 6
    blocks = build(max_length=30).bridge_blocks("r", Content(long_text), "cat", HALF, epoch=0)
    target = bundle.encode_text("cat").size
    assert blocks.masked_ids.size == target and blocks.block_a.num_text == 29 - target


def test_a_picture_that_does_not_fit_is_refused_with_the_numbers(build):
    for call in (
        lambda b: b.warmup(CaptionRow("r", "images/0.png", "cat"), HALF, epoch=0),
        lambda b: b.bridge_blocks("r", PICTURE, "cat", HALF, epoch=0),
        lambda b: b.embedding("e", PICTURE),
    ):
        with pytest.raises(PictureError, match=r"take 27 tokens.*max_length 20") as caught:
            call(build(max_length=20))
        assert caught.value.reason == "picture_longer_than_max_length"


def test_a_picture_may_take_all_room_where_nothing_is_reconstructed_from_text(build):
    """Claim: a picture alone is embedded; block B needs a token, without which the sample would have no label."""
    assert build(max_length=28).embedding("e", PICTURE).input_ids.size == 28
    assert build(max_length=29).bridge_blocks("r", PICTURE, "cat", HALF, epoch=0).masked_ids.size == 1
    with pytest.raises(PictureError, match="leaves no room for text in data.max_length 28"):
        build(max_length=28).bridge_blocks("r", PICTURE, "cat", HALF, epoch=0)


def test_swapped_blocks_keep_block_b_and_take_the_next_samples_block_a(build):
    builder = build()
    contents = [Content("<|image_1|>", f"images/{i}.png") for i in range(3)]
    own = [builder.bridge_blocks(f"r{i}", c, f"cat {i}", HALF, epoch=0) for i, c in enumerate(contents)]
    for i, block in enumerate(swap_blocks(own)):
        assert block.block_a is own[(i + 1) % 3].block_a and block.masked_units is own[(i + 1) % 3].masked_units
        assert block.masked_ids is own[i].masked_ids and block.hidden is own[i].hidden and block.labels is own[i].labels
    with pytest.raises(ValueError, match="at least 2"):
        swap_blocks(own[:1])
