"""Order of patches, windows and frames against Hugging Face's vision utilities."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import vision_utils

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.model.vision import divide_pictures
from megatron_cocoa.model.vision_layout import build_layout
from tests.parity import reference

GRIDS = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 9).map(lambda n: 2 * n), st.integers(1, 9).map(lambda n: 2 * n)),
    min_size=1,
    max_size=4,
)
VISION = QwenVLArchitecture.from_huggingface(reference.tiny_config("qwen2_5_vl")).vision


@given(grids=GRIDS, window_size=st.sampled_from([28, 42, 56, 112]))
def test_windows_are_hugging_faces(grids, window_size):
    """Claim: merged units come in Hugging Face's window order, and windows and frames end where its do."""
    vision = replace(VISION, window_size=window_size)
    layout = build_layout(grids, vision)
    index, windows = vision_utils.get_vision_window_index(
        torch.tensor(grids), vision.spatial_merge_size, window_size, vision.patch_size
    )
    assert layout.is_reordered
    assert np.array_equal(layout.unit_order, index)
    assert np.array_equal(layout.windows.rows[:, 1], windows[1:])
    assert np.array_equal(layout.frames.rows[:, 1], vision_utils.get_vision_cu_seqlens(torch.tensor(grids))[1:])


@given(grids=GRIDS)
def test_positions_are_hugging_faces(grids):
    """Claim: a patch keeps its height and width in its picture wherever window order puts it."""
    layout = build_layout(grids, VISION)
    wanted = vision_utils.get_vision_position_ids(torch.tensor(grids), VISION.spatial_merge_size).numpy()
    assert np.array_equal(layout.positions, wanted[layout.patch_order])
    units = layout.patch_order.reshape(-1, VISION.patches_per_unit)
    assert np.array_equal(units[:, 0] // VISION.patches_per_unit, layout.unit_order)


@given(grids=GRIDS)
def test_a_tower_without_windows_reorders_nothing(grids):
    """Claim: Qwen2-VL's tower sees whole frames in the batch's own order."""
    layout = build_layout(grids, replace(VISION, window_size=None))
    assert not layout.is_reordered and layout.windows is layout.frames
    assert np.array_equal(layout.patch_order, np.arange(sum(t * h * w for t, h, w in grids)))


@given(grids=st.one_of(st.just([]), GRIDS), parts=st.integers(1, 6))
def test_pictures_are_divided_whole_in_order_and_evenly(grids, parts):
    """Claim: over context-parallel ranks every picture goes to one rank, and no rank has more than its share and half
    of its outermost pictures."""
    runs = divide_pictures(grids, parts)
    assert len(runs) == parts
    assert runs[0][0] == 0 and runs[-1][1] == len(grids)
    assert all(a[1] == b[0] and a[0] <= a[1] for a, b in zip(runs, [*runs[1:], (len(grids), 0)]))
    sizes = [t * h * w for t, h, w in grids]
    for first, last in runs:
        load = sum(sizes[first:last])
        if load:
            assert load <= sum(sizes) / parts + (sizes[first] + sizes[last - 1]) / 2


@pytest.mark.parametrize("parts, wanted", [(2, [(0, 2), (2, 4)]), (4, [(0, 1), (1, 2), (2, 3), (3, 4)])])
def test_equal_pictures_are_divided_equally(parts, wanted):
    """Claim: equal pictures give equal loads."""
    assert divide_pictures([(1, 4, 4)] * 4, parts) == wanted
