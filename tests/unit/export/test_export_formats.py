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
from transformers import PreTrainedTokenizerFast

from megatron_cocoa import CocoaEmbedder
from megatron_cocoa.checkpoint.bits import same_bits
from megatron_cocoa.checkpoint.huggingface import HuggingFaceReader
from megatron_cocoa.conversion import memory
from megatron_cocoa.conversion.hf_to_mcore import convert_hf_to_mcore
from megatron_cocoa.conversion.mcore_to_hf import convert_mcore_to_hf
from megatron_cocoa.export.check_golden import check_golden
from megatron_cocoa.export.embed_corpus import ShardPlan, prepare_output
from megatron_cocoa.export.embedder_options import EmbedderOptions, default_format
from megatron_cocoa.export.export_info import read_export_info
from megatron_cocoa.export.folder import export_embedder
from megatron_cocoa.export.plain_transformers import PlainEmbedder
from tests.unit.exported_folders import Folders, write_exported
from tools.embed import _made_from, main, parse

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
    """Claim: the run's settings, in its output folder, say where the tokenizer is, and CocoaEmbedder finds the same
    folder."""
    assert default_format(run) == "hf" and default_format(qwen2.checkpoint) == "plain"
    report = export_embedder(run, tmp_path / "exported", options=EmbedderOptions("hf"))
    said = "\n".join(report.left_out)
    assert "picture size" not in said and "row" in said and "mask token" in said
    assert all(result.passed for result in check_golden(tmp_path / "exported"))
    found = CocoaEmbedder.from_pretrained(run).encode(items())
    assert np.array_equal(found, CocoaEmbedder.from_pretrained(tmp_path / "exported").encode(items()))
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["text_config"]["is_causal"] is False


def sizes_of(path: Path, **options) -> tuple[int | None, tuple[int, int] | None]:
    pictures = CocoaEmbedder.from_pretrained(path, **options).builder.pictures
    return pictures.image_size, pictures.pixel_limits


@pytest.mark.parametrize("said_by", ["checkpoint", "settings of the run"])
def test_squares_travel_with_the_model(run, tmp_path, said_by):
    """Claim: a checkpoint, its export, transformers as the card says and the export converted back resize pictures as
    the training did, with nothing said at loading, and give the same vectors; `native` keeps shapes in all of them, and
    in what is exported so from the export converted back."""
    if said_by == "checkpoint":
        output = shutil.copytree(run.parents[1], tmp_path / "output")
        checkpoint = output / run.relative_to(run.parents[1])
        (output / "settings.yaml").write_text((output / "settings.yaml").read_text().replace(str(SIDE), "140"))
        pictures = {"image_size": SIDE, "min_image_tokens": None, "max_image_tokens": None}
        info = json.loads((checkpoint / "cocoa.json").read_text()) | {"pictures": pictures}
        (checkpoint / "cocoa.json").write_text(json.dumps(info))
    else:
        checkpoint = run
    export_embedder(checkpoint, tmp_path / "exported", options=EmbedderOptions("hf"))
    convert_hf_to_mcore(tmp_path / "exported", tmp_path / "back")
    forms = [checkpoint, tmp_path / "exported", tmp_path / "back"]
    assert [sizes_of(form) for form in forms] == [(SIDE, None)] * 3
    assert [sizes_of(form, image_size=2 * SIDE) for form in forms] == [(2 * SIDE, None)] * 3
    limits = (56 * 56, 56 * 56)
    assert [sizes_of(form, image_size="native") for form in forms] == [(None, limits)] * 3
    assert [sizes_of(form, min_image_tokens=9) for form in forms] == [(None, (9 * 14**2, limits[1]))] * 3
    vectors = CocoaEmbedder.from_pretrained(checkpoint).encode(items())
    for form in forms[1:]:
        assert np.array_equal(CocoaEmbedder.from_pretrained(form).encode(items()), vectors)
    native = EmbedderOptions("hf", image_size="native", golden=False)
    export_embedder(tmp_path / "back", tmp_path / "native", options=native)
    assert sizes_of(tmp_path / "native") == (None, limits)
    assert f"image_size={SIDE})" in (tmp_path / "exported" / "README.md").read_text()
    wanted = plain_vectors(PlainEmbedder(tmp_path / "exported", image_size=SIDE))
    assert distances(vectors, wanted).max() < 1e-6
    assert all(result.passed for result in check_golden(tmp_path / "exported"))


@pytest.mark.parametrize(
    ("options", "side", "line"),
    [
        (EmbedderOptions("hf", image_size="native", golden=False), None, "keeps their shape, as asked"),
        (EmbedderOptions("hf", max_image_tokens=20, golden=False), None, "keeps their shape, as asked"),
        (EmbedderOptions("hf", image_size=56, golden=False), 56, "resizes them to 56 x 56, as asked"),
        (EmbedderOptions("sentence-transformers", golden=False), None, "keeps their shape; --format hf resizes them"),
    ],
    ids=["native", "limits", "other square", "sentence-transformers"],
)
def test_an_export_says_where_it_departs_from_the_size_of_the_training(run, tmp_path, options, side, line):
    """Claim: another picture size than the training's is exported where it is asked for, or where the format has none,
    and said; CocoaEmbedder does what the folder's other readers do."""
    report = export_embedder(run, tmp_path / "exported", options=options)
    assert f"stage contrastive resized pictures to {SIDE} x {SIDE}, the folder {line}" in report.left_out[-1]
    assert read_export_info(tmp_path / "exported").image_size == side == sizes_of(tmp_path / "exported")[0]


def test_vectors_of_another_picture_size_are_not_mixed(run, tmp_path):
    """Claim: a folder of vectors says the square that the model brought along, so that one of another size, or one of a
    version that kept pictures' shapes, is not continued."""
    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}\n')

    def made_from(*arguments: str) -> dict:
        needed = ("--model", str(run), "--corpus", str(tmp_path / "corpus.jsonl"), "--output", str(tmp_path / "out"))
        return _made_from(parse([*needed, *arguments]), "fingerprint")

    assert made_from() == made_from("--image-size", str(SIDE))
    assert made_from()["image_size"] == SIDE and made_from("--image-size", "native")["image_size"] == "native"
    plan = ShardPlan(tmp_path / "out", num_items=1, shard_size=1)
    prepare_output(plan, made_from() | {"image_size": None})
    plan.file("ids", 0).write_text("")
    with pytest.raises(ValueError, match=f"another image_size .image_size was None, is now {SIDE}"):
        prepare_output(plan, made_from())


def test_golden_vectors_that_do_not_fit_are_told_first(run, tmp_path, monkeypatch):
    """Claim: where memory is one byte short an export names --no-golden before it writes anything, and does without."""
    needed = memory.fp32_bytes(memory.size_of_checkpoint(run).num_parameters)
    monkeypatch.setattr(memory, "available_bytes", lambda: needed - 1)
    with pytest.raises(ValueError, match="golden.json runs a model of .*leave it out with --no-golden"):
        export_embedder(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_embedder(run, tmp_path / "out", options=EmbedderOptions("hf", golden=False))


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


def test_text_that_spells_a_token_stays_text(qwen2, run, tmp_path):
    """Claim: run as its card says, an export reads no control token out of a text, like CocoaEmbedder: not a special
    one, and not one that is merely added, as Qwen2.5's <tool_call>, which transformers' own option would read."""
    companions = shutil.copytree(qwen2.hf, tmp_path / "hf")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(companions)
    assert tokenizer.add_tokens(["<tool_call>"]) == 1
    tokenizer.save_pretrained(companions)
    options = EmbedderOptions("hf", golden=False)
    export_embedder(run, tmp_path / "exported", companions=companions, options=options)
    plain = PlainEmbedder(tmp_path / "exported", image_size=SIDE)
    texts = ["a <tool_call> b", "a <|im_end|> b", "a b"]
    wanted = np.stack([plain.embed(text).numpy() for text in texts]).astype(np.float64)
    found = CocoaEmbedder.from_pretrained(tmp_path / "exported").encode([{"text": text} for text in texts])
    assert distances(found, wanted).max() < 1e-6


def test_no_chat_template_is_left(qwen2, run, tmp_path):
    """Claim: wherever a published folder keeps its template, the exported one has none: it is no chat model. The way
    back, in format plain, keeps it."""
    companions = shutil.copytree(qwen2.hf, tmp_path / "hf")
    template = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    for name in ("tokenizer_config.json", "processor_config.json", "chat_template.json"):
        content = json.loads((companions / name).read_text()) if (companions / name).is_file() else {}
        (companions / name).write_text(json.dumps(content | {"chat_template": template}))
    options = EmbedderOptions("hf", golden=False)
    export_embedder(run, tmp_path / "exported", companions=companions, options=options)
    assert not [file for file in (tmp_path / "exported").glob("*.json") if "for message in" in file.read_text()]
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "exported").chat_template is None
    convert_mcore_to_hf(run, tmp_path / "plain", companions=companions)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "plain").chat_template == template


@pytest.mark.parametrize("saved_by", ["transformers 4", "older names", "transformers 5", "both"])
def test_limits_of_pictures_travel_with_the_model(qwen2, run, tmp_path, saved_by):
    """Claim: image tokens that the training was bounded to are the checkpoint's and the export's own, for transformers
    as for CocoaEmbedder, with nothing said at loading; asked for, others take their place."""
    checkpoint = shutil.copytree(run, tmp_path / "checkpoint")
    companions = shutil.copytree(qwen2.hf, tmp_path / "hf")
    file = companions / "preprocessor_config.json"
    content = json.loads(file.read_text())
    if saved_by == "older names":
        file.write_text(json.dumps(content | {"min_pixels": 1, "max_pixels": 10**6}))
    if saved_by in ("transformers 5", "both"):
        (companions / "processor_config.json").write_text(json.dumps({"image_processor": content}))
    if saved_by == "transformers 5":
        file.unlink()
    limits = {"min_image_tokens": 6, "max_image_tokens": 9}
    info = json.loads((checkpoint / "cocoa.json").read_text()) | {"pictures": {"image_size": None, **limits}}
    (checkpoint / "cocoa.json").write_text(json.dumps(info))
    export_embedder(checkpoint, tmp_path / "exported", companions=companions, options=EmbedderOptions("hf"))
    found = CocoaEmbedder.from_pretrained(tmp_path / "exported")
    low, high = found.builder.pictures.pixel_limits
    assert (low, high) == (6 * 14**2, 9 * 14**2), "a merged unit is 14 x 14 pixels here"
    own = CocoaEmbedder.from_pretrained(checkpoint, model_path=companions)
    assert own.builder.pictures.pixel_limits == (low, high)
    vectors = found.encode(items())
    assert np.array_equal(vectors, own.encode(items()))
    wanted = plain_vectors(PlainEmbedder(tmp_path / "exported"))
    assert distances(vectors, wanted).max() < 1e-6
    unbounded = CocoaEmbedder.from_pretrained(run, image_size="native").encode(items())
    assert distances(unbounded[3:], wanted[3:]).max() > 1e-4, "the limits are not without effect"
    asked = EmbedderOptions("sentence-transformers", max_image_tokens=20, golden=False)
    export_embedder(checkpoint, tmp_path / "asked", companions=companions, options=asked)
    assert CocoaEmbedder.from_pretrained(tmp_path / "asked").builder.pictures.pixel_limits[1] == 20 * 14**2


def test_sizes_that_cannot_be_expressed_are_refused(run, tmp_path):
    """Claim: a fixed size is refused where the image processor cannot be told so, or patches do not fit, with why."""
    with pytest.raises(ValueError, match=re.escape("keeps a picture's shape under every setting")):
        EmbedderOptions("sentence-transformers", image_size=SIDE)
    with pytest.raises(ValueError, match="image_size 60 is not a multiple of 14 pixels"):
        export_embedder(run, tmp_path / "x", options=EmbedderOptions("hf", image_size=60, golden=False))
    with pytest.raises(ValueError, match="would have no effect"):
        EmbedderOptions("hf", image_size=SIDE, max_image_tokens=9)
    with pytest.raises(ValueError, match="would need at least 3920 and at most 196 pixels"):
        options = EmbedderOptions("hf", min_image_tokens=20, max_image_tokens=1, golden=False)
        export_embedder(run, tmp_path / "x", options=options)
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


def test_an_output_that_cannot_be_written_is_one_line(qwen2, tmp_path, capsys):
    """Claim: tools/embed.py ends in status 2 and a line for what a disk refuses, too."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "1", "text": "a"}\n')
    assert main(["--model", str(qwen2.exported), "--corpus", str(corpus), "--output", str(corpus / "vectors")]) == 2
    assert "error: " in capsys.readouterr().err
