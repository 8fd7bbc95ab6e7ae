"""Sizes of pictures without objects: what was put comes back, and memory has a bound."""

import numpy as np
from PIL import Image

from megatron_cocoa.data import preprocess
from megatron_cocoa.data.preprocess import PictureLoader, load_processor
from megatron_cocoa.data.size_cache import SizeCache
from megatron_cocoa.data.stored import StoredPicture


def test_what_is_put_comes_back_until_the_table_is_full():
    """Claim: no key gets another one's size, keys whose hashes share a place or are 0 or negative among them."""
    capacity = 500
    cache = SizeCache(capacity)
    # Integers hash to themselves: every second one of these begins at the same place as another.
    keys = [0, *range(-100, -1), *(1000 * i for i in range(1, 100)), *(f"{i}.jpg" for i in range(301))]
    assert len(keys) == capacity
    for number, key in enumerate(keys):
        assert cache.get(key) is None
        cache.put(key, (number, 2**31 - 1 - number))
    cache.put("one too many", (1, 1))
    assert [cache.get(key) for key in keys] == [(number, 2**31 - 1 - number) for number in range(capacity)]
    assert cache.get("one too many") is None


def test_a_size_takes_32_bytes():
    """Claim: less than a tenth of a reference, a tuple and a dictionary's entry, and no more for longer paths."""
    assert SizeCache(1000).nbytes == 32 * 1000


def test_a_header_is_read_once(tmp_path, model_folder, vision, monkeypatch):
    """Claim: where pictures keep their shape, planning an epoch again opens no file."""
    Image.fromarray(np.zeros((40, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    loader = PictureLoader(tmp_path, processor=load_processor(model_folder), vision=vision)
    refs = ["a.png", StoredPicture(str(tmp_path), "a.png")]
    grids = [loader.planned_grid(ref) for ref in refs]
    monkeypatch.setattr(preprocess, "open_picture", None)
    assert [loader.planned_grid(ref) for ref in refs] == grids
