"""Exported embedding models: both families, BF16, fixed picture sizes, and where tokenizer and settings come from."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cocoa import CocoaEmbedder
from megatron_cocoa.checkpoint.convert import same_bits
from megatron_cocoa.checkpoint.huggingface import HuggingFaceReader
from megatron_cocoa.export.check_golden import check_golden
from megatron_cocoa.export.export_info import read_export_info
from megatron_cocoa.export.folder import EmbedderOptions, default_format, export_embedder
from megatron_cocoa.export.plain_transformers import PlainEmbedder
from tests.unit.exported_folders import Folders, write_exported

SIDE = 70


def picture(width: int, height: int, *, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def items() -> list[dict]:
    return [
        {"text": "a"},
        {"text": "a red house beside two small trees " * 4},
        {"image": picture(56, 56)},
        {"image": picture(140, 60, seed=1)},
        {"text": "the moon", "image": picture(30, 131, seed=2)},
    ]


def plain_vectors(plain: PlainEmbedder) -> np.ndarray:
    return np.stack([plain.embed(**item).numpy() for item in items()]).astype(np.float64)


def distances(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return 1 - (found.astype(np.float64) * wanted).sum(axis=1)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory) -> Folders:
    """Qwen2-VL in BF16, exported for transformers with square pictures."""
    options = EmbedderOptions("hf", image_size=SIDE)
    return write_exported(
        tmp_path_factory.mktemp("qwen2"), family="qwen2_vl", dtype=torch.bfloat16, options=options
    )


def test_qwen2_vl_in_bf16_with_square_pictures_agrees_with_transformers(qwen2):
    """Claim: of the other family, too, with BF16 weights and pictures of one fixed size, the export run as its card
    says and CocoaEmbedder give the same vectors, and the golden ones."""
    info = read_export_info(qwen2.exported)
    bridge, side = info.bridge_token, info.image_size
    assert side == SIDE and f"image_size={SIDE})" in (qwen2.exported / "README.md").read_text()
    with HuggingFaceReader(qwen2.hf) as first, HuggingFaceReader(qwen2.exported) as second:
        assert {second.dtype(name) for name in second.keys()} == {"BF16"}
        assert all(same_bits(first.get(name), second.get(name)) for name in first.keys())
    wanted = plain_vectors(PlainEmbedder(qwen2.exported, bridge_token=bridge, image_size=side))
    found = CocoaEmbedder.from_pretrained(qwen2.exported).encode(items())
    # Promised is 0.9999; two FP32 programs differ by about 1e-6 of a vector, the cosine by its square.
    assert distances(found, wanted).max() < 1e-6
    for library in ("transformers", "megatron_cocoa"):
        assert all(result.passed for result in check_golden(qwen2.exported, library=library))
    # The size is not without effect: kept shapes give other vectors of the pictures that are not square.
    native = CocoaEmbedder.from_pretrained(qwen2.checkpoint)
    assert distances(native.encode(items())[3:], wanted[3:]).min() > 1e-4
    asked = CocoaEmbedder.from_pretrained(qwen2.checkpoint, image_size=SIDE)
    assert np.array_equal(asked.encode(items()), found)


def test_computing_in_bf16_costs_no_more_than_it_costs_transformers(qwen2):
    """Claim: CocoaEmbedder in BF16 is as near to FP32 as transformers in BF16 is, and independent of the batch."""
    exact = plain_vectors(PlainEmbedder(qwen2.exported, image_size=SIDE))
    theirs = distances(plain_vectors(PlainEmbedder(qwen2.exported, image_size=SIDE, dtype=torch.bfloat16)), exact)
    embedder = CocoaEmbedder.from_pretrained(qwen2.exported, dtype="bf16")
    assert next(embedder.model.bare_chunks[0].parameters()).dtype == torch.bfloat16
    ours = distances(embedder.encode(items()), exact)
    # Both round at other places; the mean over inputs of two draws of the same rounding error lies within a factor.
    assert 0 < ours.mean() < 2 * theirs.mean()
    alone = embedder.encode(items(), batch_size=1)
    assert distances(alone, embedder.encode(items()).astype(np.float64)).max() <= theirs.max()


@pytest.fixture(scope="module")
def run(qwen2, tmp_path_factory) -> Path:
    """The output folder of a run with one trained stage, whose checkpoint carries no tokenizer."""
    output = tmp_path_factory.mktemp("output")
    checkpoint = shutil.copytree(qwen2.checkpoint, output / "contrastive" / "checkpoint")
    shutil.rmtree(checkpoint / "huggingface")
    info = json.loads((checkpoint / "cocoa.json").read_text()) | {"stage": "contrastive", "step": 7}
    (checkpoint / "cocoa.json").write_text(json.dumps(info))
    settings = {"model": {"path": str(qwen2.hf), "bridge_token": "<|im_end|>"}, "contrastive": {"image_size": SIDE}}
    (output / "settings.yaml").write_text(json.dumps(settings))
    return checkpoint


def test_a_run_is_exported_with_its_own_tokenizer(qwen2, run, tmp_path):
    """Claim: the run's settings, in its output folder, say where the tokenizer is and which picture size it trained
    with; the export says where it departs from that, and CocoaEmbedder finds the same folder."""
    assert default_format(run) == "hf" and default_format(qwen2.checkpoint) == "plain"
    report = export_embedder(run, tmp_path / "exported", options=EmbedderOptions("hf"))
    said = "\n".join(report.left_out)
    assert f"stage contrastive resized pictures to {SIDE} x {SIDE}" in said and "row" in said and "mask token" in said
    assert all(result.passed for result in check_golden(tmp_path / "exported"))
    found = CocoaEmbedder.from_pretrained(run).encode(items())
    assert np.array_equal(found, CocoaEmbedder.from_pretrained(tmp_path / "exported").encode(items()))
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["text_config"]["is_causal"] is False and "cocoa_image_size" not in config


def test_what_an_embedding_model_lacks_is_said(run, tmp_path):
    """Claim: without golden vectors, or without a tokenizer, the folder is still transformers' and the report says
    what is missing; sentence-transformers, which loads nothing without a tokenizer, is refused."""
    report = export_embedder(run, tmp_path / "bare", options=EmbedderOptions("hf", golden=False))
    assert any(line.startswith("golden.json, as asked") for line in report.left_out)
    assert not (tmp_path / "bare" / "golden.json").exists()
    assert "golden.json" not in (tmp_path / "bare" / "README.md").read_text()
    alone = shutil.copytree(run, tmp_path / "alone" / "deep" / "checkpoint")
    report = export_embedder(alone, tmp_path / "without")
    assert "tokenizer.json" in report.left_out[-1] and "--companions" in report.left_out[-1]
    assert json.loads((tmp_path / "without" / "config.json").read_text())["text_config"]["is_causal"] is False
    with pytest.raises(ValueError, match="lacks tokenizer.json.*--companions"):
        export_embedder(alone, tmp_path / "st", options=EmbedderOptions("sentence-transformers"))
    assert not (tmp_path / "st").exists()


def test_sizes_that_cannot_be_expressed_are_refused(run, tmp_path):
    """Claim: a fixed size is refused where the image processor cannot be told so, or patches do not fit, with why."""
    with pytest.raises(ValueError, match=re.escape("keeps a picture's shape under every setting")):
        EmbedderOptions("sentence-transformers", image_size=SIDE)
    with pytest.raises(ValueError, match="image_size 60 is not a multiple of 14 pixels"):
        export_embedder(run, tmp_path / "x", options=EmbedderOptions("hf", image_size=60, golden=False))
    with pytest.raises(ValueError, match="format is 'onnx'"):
        replace(EmbedderOptions(), format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_why_a_fixed_size_cannot_be_expressed(qwen2):
    """Claim: the reason given for the refusal is true: with equal bounds on the area, transformers' processor still
    gives pictures of different shapes different grids."""
    processor = PlainEmbedder(qwen2.exported, image_size=SIDE).processor
    size = {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}
    grids = processor(images=[picture(56, 56), picture(140, 60)], size=size, return_tensors="np")["image_grid_thw"]
    assert grids[1, 1] != grids[1, 2]
