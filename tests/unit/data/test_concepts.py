"""The split never puts a variant or a twin of a held-out picture into training."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_cocoa.data.concepts import assign_splits, base_concept, picture_twins, split_of

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


@pytest.mark.parametrize("person", ["man", "woman", "person"])
@pytest.mark.parametrize("tone", TONES)
def test_variants_of_a_caption_share_one_concept(person, tone):
    assert base_concept(f"{person} astronaut: {tone} skin tone") == base_concept("astronaut") == "astronaut"


@pytest.mark.parametrize(
    ("variant", "concept"),
    [
        ("woman running facing right: dark skin tone", "running"),
        ("men with bunny ears", "bunny ears"),
        ("old woman", "older person"),
        ("merman: light skin tone", "mermaid"),
        ("woman: light skin tone", "woman"),
        ("medium-light skin tone", "medium light skin tone"),
        ("light bulb", "light bulb"),
        ("!?", "!?"),
    ],
)
def test_concepts_of_awkward_captions(variant, concept):
    assert base_concept(variant) in (concept, base_concept(concept))


def test_about_a_tenth_of_the_concepts_is_held_out():
    share = np.mean([split_of(f"concept {i}") == "heldout" for i in range(5000)])
    # Standard error of a 10% share among 5000 is 0.4 points: four of them.
    assert abs(share - 0.10) < 0.017


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=2, max_size=40), st.randoms())
def test_twins_and_variants_always_go_the_same_way(items, random):
    """Pictures are noise around one of a few originals; captions name one of a few concepts, in variants."""
    rng = np.random.default_rng(random.randrange(2**32))
    originals = rng.integers(0, 256, size=(7, 8, 8, 3))
    thumbnails = np.stack([np.clip(originals[p] + rng.integers(-9, 10, (8, 8, 3)), 0, 255) for p, _ in items])
    captions = [f"{random.choice(('man', 'woman'))} thing {c}: {random.choice(TONES)} skin tone" for _, c in items]
    concepts, splits = assign_splits(captions, thumbnails.astype(np.uint8))
    for i, j in picture_twins(thumbnails.astype(np.uint8)):
        assert splits[i] == splits[j]
    held_out = {c for c, s in zip(concepts, splits) if s == "heldout"}
    assert not held_out & {c for c, s in zip(concepts, splits) if s == "train"}


def test_twins_equal_numpy_correlation():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, size=(40, 6, 6, 3), dtype=np.uint8)
    pictures[20:] = np.clip(pictures[:20] * rng.uniform(0.5, 1.0, (20, 1, 1, 1)) + 20, 0, 255)
    correlation = np.corrcoef(pictures.reshape(40, -1))
    expected = [(i, j) for i in range(40) for j in range(i + 1, 40) if correlation[i, j] > 0.95]
    assert expected and [tuple(pair) for pair in picture_twins(pictures, threshold=0.95, rows=7).tolist()] == expected


def test_flat_pictures_have_no_twins():
    assert len(picture_twins(np.full((3, 4, 4, 3), 255, dtype=np.uint8))) == 0


def test_counts_must_agree():
    with pytest.raises(ValueError, match="2 captions for 1 thumbnails"):
        assign_splits(["a", "b"], np.zeros((1, 2, 2, 3), dtype=np.uint8))


def test_no_held_out_toy_picture_has_a_variant_or_twin_in_training(toy):
    """On the real set, measured on other thumbnails than those that the split was drawn from."""
    rows = {
        split: [json.loads(line) for line in (toy.pairs / f"eval_{split}.jsonl").read_text("utf-8").splitlines()]
        for split in ("train", "heldout")
    }
    assert not {r["concept"] for r in rows["train"]} & {r["concept"] for r in rows["heldout"]}
    both = rows["train"] + rows["heldout"]
    small = []
    for row in both:
        with Image.open(toy.pairs / row["image_path"]) as image:
            small.append(np.asarray(image.resize((36, 36), Image.Resampling.BILINEAR)))
    twins = picture_twins(np.stack(small), threshold=0.95)
    crossing = (twins < len(rows["train"])).sum(axis=1) == 1
    assert len(twins) > 1000 and not crossing.any()
