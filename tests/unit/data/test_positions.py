"""M-RoPE positions of a sample equal Hugging Face's ``get_rope_index``, for every layout of text and vision."""

from __future__ import annotations

import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from megatron_cocoa.data.positions import VisionSegment, mrope_positions


def reference(model_class, segments, *, tokens_per_second):
    """Hugging Face's own method on a stand-in that carries the two numbers which it reads."""
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=tokens_per_second))
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = types.MethodType(model_class.get_vision_position_ids, model)
    types_row, images, videos, seconds = [], [], [], []
    for segment in segments:
        if isinstance(segment, int):
            types_row += [0] * segment
            continue
        t, h, w = segment.grid_thw
        video = segment.seconds_per_grid is not None
        types_row += [2 if video else 1] * (t * h * w // 4)
        (videos if video else images).append(segment.grid_thw)
        if video:
            seconds.append(segment.seconds_per_grid)
    kwargs = {"second_per_grid_ts": torch.tensor(seconds)} if tokens_per_second and seconds else {}
    positions, _ = model_class.get_rope_index(
        model,
        input_ids=torch.zeros(1, len(types_row), dtype=torch.int64),
        mm_token_type_ids=torch.tensor([types_row]),
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
        **kwargs,
    )
    return positions[:, 0].numpy()


def random_layout(rng, *, video):
    segments = [int(rng.integers(1, 9))]
    for _ in range(int(rng.integers(0, 4))):
        h, w = (2 * rng.integers(1, 6, size=2)).tolist()
        if video and rng.random() < 0.5:
            seconds = float(rng.choice([0.5, 1.0, 0.7, 2.0]))
            segments.append(VisionSegment((int(rng.integers(1, 6)), h, w), seconds))
        else:
            segments.append(VisionSegment((1, h, w)))
        segments.append(int(rng.integers(1, 9)))
    return tuple(segments)


@pytest.mark.parametrize("seed", range(25))
def test_random_layouts_equal_qwen2_5_vl(seed):
    layout = random_layout(np.random.default_rng(seed), video=True)
    ours = mrope_positions(layout, spatial_merge_size=2, tokens_per_second=4)
    np.testing.assert_array_equal(ours, reference(Qwen2_5_VLModel, layout, tokens_per_second=4))


@pytest.mark.parametrize("seed", range(15))
def test_random_layouts_equal_qwen2_vl(seed):
    layout = random_layout(np.random.default_rng(seed), video=True)
    ours = mrope_positions(layout, spatial_merge_size=2, tokens_per_second=None)
    np.testing.assert_array_equal(ours, reference(Qwen2VLModel, layout, tokens_per_second=None))


def test_times_are_rounded_as_qwen2_5_vl_rounds_them():
    """Claim: the product is float32's: frame 15 comes at 62.999996, which is 62; float64 would give it 63."""
    layout = (1, VisionSegment((31, 2, 2), 1.05), 1)
    ours = mrope_positions(layout, spatial_merge_size=2, tokens_per_second=4)
    np.testing.assert_array_equal(ours, reference(Qwen2_5_VLModel, layout, tokens_per_second=4))
    assert ours[0, 1 + 15] == 1 + 62 and int(15 * (4 * 1.05)) == 63


def test_plain_text_counts_up_on_all_axes():
    np.testing.assert_array_equal(mrope_positions((5,), spatial_merge_size=2), np.tile(np.arange(5), (3, 1)))


def test_video_frames_are_tokens_per_second_apart():
    positions = mrope_positions((1, VisionSegment((3, 2, 2), 0.5), 1), spatial_merge_size=2, tokens_per_second=4)
    assert positions[0].tolist() == [0, 1, 3, 5, 2]


def test_cached_positions_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        mrope_positions((3,), spatial_merge_size=2)[0, 0] = 7


def test_grid_that_does_not_merge_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 3, 4\).*spatial_merge_size 2"):
        mrope_positions((1, VisionSegment((1, 3, 4))), spatial_merge_size=2)
