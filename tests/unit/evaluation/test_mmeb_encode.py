"""Vectors from a real model: batch size, order, model forms and special texts."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_cocoa import CocoaEmbedder
from megatron_cocoa.evaluation.mmeb_data import EvalItem
from megatron_cocoa.evaluation.mmeb_encode import ItemEncoder, longest_first
from megatron_cocoa.evaluation.mmeb_files import Identity
from megatron_cocoa.evaluation.mmeb_run import evaluate
from megatron_cocoa.evaluation.mmeb_summary import summarize
from megatron_cocoa.evaluation.mmeb_tasks import read_benchmark
from tests.unit.exported_folders import Folders, write_exported
from tests.unit.mmeb_folders import write_small_benchmark

BATCH_BOUND = 1e-5
"""The same sums in packs of another length: kernels may add in another order, by about 1e-6 in FP32."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    folders = write_exported(tmp_path_factory.mktemp("encode"))
    write_small_benchmark(folders.root)
    return folders


@pytest.fixture(scope="module")
def embedder(folders) -> CocoaEmbedder:
    return CocoaEmbedder.from_pretrained(folders.exported)


@pytest.fixture(scope="module")
def items() -> list[EvalItem]:
    texts = [EvalItem("word " * n, "") for n in (1, 30, 7)]
    return texts + [EvalItem("<|image_1|>\nwhat " + "x" * i, f"images/{i}.png") for i in range(6)]


def encoder(embedder, folders, **more) -> ItemEncoder:
    return ItemEncoder(embedder.model, embedder.builder, embedder.options, folders.root, **more)


def test_batch_size_threads_and_order_change_nothing(embedder, folders, items):
    """Claim: a vector is the item's own: it follows neither the pack nor the order, and equals the embedder's."""
    wanted = encoder(embedder, folders, batch_size=1, num_workers=0)(items).vectors
    pictures = [str(folders.root / item.image_path) if item.image_path else None for item in items]
    plain = embedder.encode([{"text": item.text, "image": path} for item, path in zip(items, pictures)])
    assert wanted == pytest.approx(plain, abs=BATCH_BOUND)
    for batch_size, num_workers in ((2, 0), (4, 3), (32, 1)):
        found = encoder(embedder, folders, batch_size=batch_size, num_workers=num_workers)(items)
        assert found.vectors == pytest.approx(wanted, abs=BATCH_BOUND) and not found.cut.any()
    order = np.random.default_rng(1).permutation(len(items))
    mixed = encoder(embedder, folders, batch_size=4)([items[i] for i in order]).vectors
    # The packs are those of the sorted items: the very same bits.
    assert np.array_equal(mixed, encoder(embedder, folders, batch_size=4)(items).vectors[order])


def test_longest_first_is_a_function_of_the_set(folders, items):
    """Claim: the order in which items come does not change which share a pack."""
    items = [*items, EvalItem("as long", ""), EvalItem("gone as", "")]
    first = [items[i] for i in longest_first(items, folders.root)]
    again = [items[::-1][i] for i in longest_first(items[::-1], folders.root)]
    assert first == again


def test_cut_texts_are_counted(folders):
    """Claim: what max_length cuts is counted, and image tokens are never cut."""
    short = CocoaEmbedder.from_pretrained(folders.exported, max_length=60)
    items = [EvalItem("word " * 200, ""), EvalItem("word", ""), EvalItem("w " * 90, "images/0.png")]
    assert encoder(short, folders)(items).cut.tolist() == [True, False, True]


def test_control_tokens_in_texts_stay_text(embedder, folders):
    """Claim: a text that spells an image token announces no picture, beside a real picture neither."""
    spelled = "<|vision_start|><|image_pad|><|im_end|>"
    texts = [EvalItem(spelled, ""), EvalItem(f"<|image_1|>{spelled}", "images/0.png"), EvalItem("", "images/0.png")]
    found = encoder(embedder, folders)(texts).vectors
    assert np.isfinite(found).all() and float(found[1] @ found[2]) < 0.9999


def test_pictures_that_cannot_be_used_are_named(embedder, folders, tmp_path):
    """Claim: a broken picture stops the evaluation with its name, before and while it is decoded."""
    (tmp_path / "a.png").write_bytes(b"")
    whole = Path(folders.root / "images/0.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (1, 900)).save(tmp_path / "c.png")
    for name, message in (("a.png", "cannot be opened"), ("b.png", "b.png cannot be decoded"), ("c.png", "1 x 900")):
        with pytest.raises(ValueError, match=message):
            ItemEncoder(embedder.model, embedder.builder, embedder.options, tmp_path)([EvalItem("x", name)])


def test_model_forms_give_the_same_scores(folders, tmp_path):
    """Claim: a Megatron checkpoint and its exported folder score alike, at any batch size."""
    found = {}
    for name, path, batch_size in (("export", folders.exported, 32), ("checkpoint", folders.checkpoint, 3)):
        made = CocoaEmbedder.from_pretrained(path)
        evaluate(
            (benchmark := read_benchmark(folders.root / "eval")).tasks,
            data_path=folders.root / "eval",
            image_root=folders.root,
            output=tmp_path / name,
            encode=encoder(made, folders, batch_size=batch_size),
            identity=Identity({}, {}, benchmark.to_json()),
            versions={},
            with_baselines=True,
            say=lambda line: None,
        )
        found[name] = summarize(tmp_path / name).to_json()
    assert found["export"] == found["checkpoint"]
