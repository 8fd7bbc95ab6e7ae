"""Generated bad rows and files: each is left out under its documented reason, or ends the reading with a message."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cocoa.config import SourceSettings
from megatron_cocoa.data.prepared import CorruptionSettings
from megatron_cocoa.data.preprocess import PictureLoader, load_processor
from megatron_cocoa.data.row_parsing import pair_row
from megatron_cocoa.data.rows import CaptionRow, Content
from megatron_cocoa.data.samples import SampleBuilder
from megatron_cocoa.data.source_list import source_rows
from megatron_cocoa.data.sources import read_captions
from tests.unit.data.rows import pair, read_bridge_pairs, read_pairs, write_jsonl

MARK = "<|image_1|>"
GOOD_CAPTIONS = [{"id": f"g{i}", "image_path": "a.png", "caption": "a cat"} for i in range(40)]
GOOD_PAIRS = [pair(f"g{i}", qry="what?", pos_text=f"cat {i}") for i in range(40)]


def caption(**columns) -> dict:
    return {"id": "bad", "image_path": "a.png", "caption": "x"} | columns


BAD_CAPTIONS = {
    "no-json": ("{broken", "not_json"),
    "half-a-line": ('{"id": "a", "image_path": "b.pn', "not_json"),
    "deep-json": ("[" * 100_000, "not_json"),
    "huge-number": ('{"id": ' + "9" * 5000 + "}", "not_json"),
    "a-list": ("[1, 2]", "not_an_object"),
    "a-number": ("3", "not_an_object"),
    "null": ("null", "not_an_object"),
    "no-columns": ({}, "image_path_missing"),
    "no-caption": ({"image_path": "a.png"}, "caption_missing"),
    "no-picture": ({"caption": "x"}, "image_path_missing"),
    "null-caption": (caption(caption=None), "caption_missing"),
    "null-picture": (caption(image_path=None), "image_path_empty"),
    "empty-caption": (caption(caption=""), "caption_empty"),
    "blank-caption": (caption(caption=" \n\t "), "caption_empty"),
    "only-marks": (caption(caption=f" {MARK} <|image_2|>"), "caption_empty"),
    "empty-path": (caption(image_path=""), "image_path_empty"),
    "number-caption": (caption(caption=7), "caption_not_text"),
    "nan-caption": ('{"id": "n", "image_path": "a.png", "caption": NaN}', "caption_not_text"),
    "infinite-caption": ('{"id": "n", "image_path": "a.png", "caption": Infinity}', "caption_not_text"),
    "list-caption": (caption(caption=["x"]), "caption_not_text"),
    "number-path": (caption(image_path=3), "image_path_not_text"),
    "object-path": (caption(image_path={"bytes": "x"}), "image_path_not_text"),
    "nan-path": ('{"id": "n", "image_path": NaN, "caption": "x"}', "image_path_not_text"),
    "several-paths": (caption(image_path=["a.png", "b.png"]), "image_path_several"),
    "no-path-in-list": (caption(image_path=[]), "image_path_empty"),
    "list-id": (caption(id=[1]), "id_not_text"),
    "lone-surrogate": ('{"id": "s", "image_path": "a.png", "caption": "\\ud800"}', "caption_not_unicode"),
    "surrogate-id": ('{"id": "\\udc00", "image_path": "a.png", "caption": "x"}', "id_not_unicode"),
}

BAD_PAIRS = {
    "no-query": ({"pos_text": "x"}, "qry_missing"),
    "no-target": ({"qry": "x"}, "pos_text_missing"),
    "null-query": (pair("b", pos_text="x") | {"qry": None}, "qry_missing"),
    "all-empty": (pair("b"), "neither_text_nor_image"),
    "empty-query": (pair("b", pos_text="x"), "neither_text_nor_image"),
    "blank-target": (pair("b", qry="x", pos_text=" \n"), "neither_text_nor_image"),
    "only-a-mark": (pair("b", qry=MARK, pos_text="x"), "neither_text_nor_image"),
    "picture-without-place": (pair("b", qry="x", qry_image_path="a.png", pos_text="x"), "image_without_placeholder"),
    "two-places": (pair("b", qry=MARK * 2, qry_image_path="a.png", pos_text="x"), "several_placeholders"),
    "second-mark-only": (
        pair("b", qry="<|image_2|>", qry_image_path="a.png", pos_text="x"),
        "image_without_placeholder",
    ),
    "mark-too-many": (
        pair("b", qry=f"{MARK}<|image_2|>", qry_image_path="a.png", pos_text="x"),
        "placeholder_without_image",
    ),
    "lengths-differ": (
        pair("b", qry=MARK, pos_text="x") | {"qry_image_path": ["a.png", "b.png"]},
        "image_without_placeholder",
    ),
    "gap-in-list": (
        pair("b", qry=MARK, pos_text="x") | {"qry_image_path": ["a.png", None]},
        "qry_image_path_has_gaps",
    ),
    "list-of-numbers": (pair("b", qry=MARK, pos_text="x") | {"qry_image_path": [1]}, "qry_image_path_not_text"),
    "nested-lists": (pair("b", qry=MARK, pos_text="x") | {"qry_image_path": [["a"]]}, "qry_image_path_not_text"),
    "number-query": (pair("b", pos_text="x") | {"qry": 1.5}, "qry_not_text"),
    "boolean-target": (pair("b", qry="x") | {"pos_text": True}, "pos_text_not_text"),
    "surrogate-target": ('{"qry": "x", "pos_text": "\\udfff"}', "pos_text_not_unicode"),
}

DROPPED_IN_BRIDGE = {
    "image-to-image": (
        pair("b", qry=MARK, qry_image_path="a.png", pos_text=MARK, pos_image_path="b.png"),
        "image_to_image",
    ),
    "constant": (pair("b", qry=MARK, qry_image_path="a.png", pos_text="Represent the given image."), "constant_target"),
    "constant-newline": (
        pair("b", qry=MARK, qry_image_path="a.png", pos_text=f"{MARK}\nRepresent the given image\n"),
        "constant_target",
    ),
    "cropped": (
        pair("b", qry="x", pos_text="Represent the given cropped image of the object"),
        "constant_target",
    ),
}


@pytest.mark.parametrize("name", BAD_CAPTIONS)
def test_a_bad_caption_row_is_counted(tmp_path, name):
    row, reason = BAD_CAPTIONS[name]
    found = read_captions(write_jsonl(tmp_path / "w.jsonl", [*GOOD_CAPTIONS, row]))
    assert len(found.rows) == 40 and found.dropped == {reason: 1}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_a_bad_pair_is_counted(tmp_path, name):
    row, reason = BAD_PAIRS[name]
    found = read_pairs(write_jsonl(tmp_path / "c.jsonl", [*GOOD_PAIRS, row]))
    assert len(found.rows) == 40 and found.dropped == {reason: 1}


@pytest.mark.parametrize("name", DROPPED_IN_BRIDGE)
def test_a_pair_without_a_text_to_reconstruct_is_counted(tmp_path, name):
    row, reason = DROPPED_IN_BRIDGE[name]
    found = read_bridge_pairs(write_jsonl(tmp_path / "b.jsonl", [*GOOD_PAIRS, row]))
    assert len(found.rows) == 40 and found.dropped == {reason: 1}


def test_texts_are_checked_as_a_whole():
    """Claim: no text is looked at character by character; over millions of rows that takes longer than all the rest."""

    class Whole(str):
        def __iter__(self):
            raise AssertionError("looked at character by character")

    record = {"qry": Whole("what?"), "pos_text": Whole("ein Kätzchen"), "neg_text": [Whole("a cat")]}
    row = pair_row(record, "0", with_negatives=True)
    assert (row.query.text, row.target.text, row.negatives[0].text) == ("what?", "ein Kätzchen", "a cat")


def test_further_columns_are_ignored(tmp_path):
    rows = [row | {"score": 1.5, "nested": {"a": [1]}} for row in GOOD_PAIRS]
    assert len(read_pairs(write_jsonl(tmp_path / "c.jsonl", rows)).rows) == 40


def parquet(path, rows=GOOD_PAIRS) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path.read_bytes()


def tar_of(members: dict[str, bytes], path, *, link: str | None = None, mode: str = "w") -> bytes:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        if link is not None:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
    return path.read_bytes()


def arrow(path, rows=GOOD_PAIRS) -> None:
    path.mkdir(exist_ok=True)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (path / "state.json").write_text(json.dumps(state))


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _shard(members: dict[str, bytes], **options):
    def make(folder):
        tar_of(members, folder / "s.tar", **options)

    return make


def _cut_parquet(folder):
    parquet(folder / "original-0.parquet")
    cut(folder / "original-0.parquet")


def _cut_arrow(folder):
    arrow(folder)
    cut(folder / "data-00000-of-00001.arrow")


def _cut_tar(folder):
    members = {f"{i}.{kind}": b"x" * 3000 for i in range(9) for kind in ("png", "txt")}
    tar_of(members, folder / "s.tar")
    cut(folder / "s.tar")


def _tar_without_an_end(folder):
    data = tar_of({"0.txt": b"x" * 512, "0.png": b"x" * 512}, folder / "s.tar")
    (folder / "s.tar").write_bytes(data[: 4 * 512])


def _damaged_header(folder):
    data = bytearray(tar_of({f"{i}.txt": b"x" * 512 for i in range(4)}, folder / "s.tar"))
    data[2 * 1024 + 130] ^= 1
    (folder / "s.tar").write_bytes(data)


def _joined_tars(folder):
    data = tar_of({"0.txt": b"x", "0.png": b"x"}, folder / "s.tar")
    (folder / "s.tar").write_bytes(2 * data)


def _escaping_state(folder):
    arrow(folder)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../other.arrow"}]}))


def _two_splits(folder):
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))


STOPS = {
    "parquet-cut": ("mmeb-train", _cut_parquet, "is not a whole parquet file"),
    "parquet-zero-bytes": ("mmeb-train", lambda f: (f / "original-0.parquet").write_bytes(b""), "not a whole parquet"),
    "parquet-text": ("mmeb-train", lambda f: (f / "original-0.parquet").write_text("qry"), "not a whole parquet file"),
    "parquet-no-column": (
        "mmeb-train",
        lambda f: parquet(f / "original-0.parquet", [{"qry": "x"}]),
        "lacks the column.*qry_image_path",
    ),
    "parquet-none": ("mmeb-train", lambda f: None, "holds parquet files of the splits none"),
    "parquet-two-splits": (
        "mmeb-train",
        lambda f: [parquet(f / f"{s}-0.parquet") for s in ("original", "train")],
        "name one of original, train",
    ),
    "arrow-cut": ("hf-datasets", _cut_arrow, "is not a whole Arrow file"),
    "arrow-no-state": ("hf-datasets", lambda f: None, "state.json cannot be read"),
    "arrow-bad-state": ("hf-datasets", lambda f: (f / "state.json").write_text("[1]"), "needed an object"),
    "arrow-outside": ("hf-datasets", _escaping_state, "leaves the data folder"),
    "arrow-two-splits": ("hf-datasets", _two_splits, "has the splits train, test"),
    "tar-cut": ("webdataset", _cut_tar, "is not a whole, uncompressed tar|cut short"),
    "tar-no-end": ("webdataset", _tar_without_an_end, "cut short|not a whole"),
    "tar-damaged": ("webdataset", _damaged_header, "up to byte 2048 alone: it is damaged"),
    "tar-joined": ("webdataset", _joined_tars, "several archives were joined"),
    "tar-compressed": ("webdataset", _shard({"0.txt": b"x"}, mode="w:gz"), "is not a whole, uncompressed tar file"),
    "tar-text": ("webdataset", lambda f: (f / "s.tar").write_text("no tar" * 200), "is not a whole, uncompressed tar"),
    "tar-none": ("webdataset", lambda f: None, "holds no .tar files"),
    "jsonl-latin-1": (
        "jsonl",
        lambda f: (f / "contrastive.jsonl").write_bytes('{"qry": "é"}'.encode("latin-1")),
        "is not UTF-8",
    ),
    "jsonl-utf-16": (
        "jsonl",
        lambda f: (f / "contrastive.jsonl").write_bytes('{"qry": "a"}'.encode("utf-16")),
        "is not UTF-8",
    ),
    "jsonl-gzip": (
        "jsonl",
        lambda f: (f / "contrastive.jsonl").write_bytes(gzip.compress(b'{"qry": "a"}')),
        r"contrastive.jsonl is compressed \(gzip\): unpack it",
    ),
    "jsonl-empty": ("jsonl", lambda f: (f / "contrastive.jsonl").write_text(""), "0 of 0 rows"),
    "jsonl-none": ("jsonl", lambda f: None, "contrastive.jsonl cannot be read"),
    "jsonl-mostly-bad": (
        "jsonl",
        lambda f: write_jsonl(f / "contrastive.jsonl", [*GOOD_PAIRS, *(["{"] * 9)]),
        "9 of 49 rows are malformed",
    ),
}


@pytest.mark.parametrize("name", STOPS)
def test_a_file_that_is_not_whole_ends_the_reading(tmp_path, name):
    """Claim: half of a file never passes for the whole; the message names the file and what was expected."""
    kind, make, message = STOPS[name]
    folder = tmp_path / "source"
    folder.mkdir()
    make(folder)
    with pytest.raises(ValueError, match=message):
        source_rows(SourceSettings("s", str(folder), kind), "contrastive", seed=0)


def _png(colour: int = 9) -> bytes:
    from tests.unit.data.test_bad_pictures import encoded

    return encoded("png")


def _samples(number: int = 40) -> dict[str, bytes]:
    return {f"{i:03}.{kind}": b"a cat" if kind == "txt" else _png() for i in range(number) for kind in ("png", "txt")}


BAD_SHARD_MEMBERS = {
    "climbing": ({"../../x.png": b"x", "../../x.txt": b"x"}, "unsafe_member"),
    "absolute": ({"/x.png": b"x", "/x.txt": b"x"}, "unsafe_member"),
    "no-caption": ({"x.png": b"x"}, "qry_missing"),
    "no-picture": ({"x.txt": b"x"}, "image_path_empty"),
    "latin-1": ({"x.png": b"x", "x.txt": "é".encode("latin-1")}, "not_utf8"),
    "empty-caption": ({"x.png": b"x", "x.txt": b""}, "caption_empty"),
    "two-pictures": ({"x.png": b"x", "x.jpg": b"x", "x.txt": b"x"}, "several_pictures_without_json"),
    "json-broken": ({"x.png": b"x", "x.json": b"{"}, "not_json"),
    "json-list": ({"x.png": b"x", "x.json": b"[]"}, "not_an_object"),
    "json-elsewhere": (
        {"x.png": b"x", "x.json": b'{"qry": "<|image_1|>", "qry_image_path": "../y.png", "pos_text": "t"}'},
        "qry_image_path_not_in_shard",
    ),
    "json-object": (
        {"x.png": b"x", "x.json": b'{"qry": "<|image_1|>", "qry_image_path": {}, "pos_text": "t"}'},
        "qry_image_path_not_in_shard",
    ),
}


@pytest.mark.parametrize("name", BAD_SHARD_MEMBERS)
def test_a_bad_sample_of_a_shard_is_counted(tmp_path, name):
    members, reason = BAD_SHARD_MEMBERS[name]
    tar_of(_samples() | members, tmp_path / "s.tar")
    found = source_rows(SourceSettings("s", str(tmp_path), "webdataset"), "contrastive", seed=0)
    assert len(found.rows) == 40 and found.dropped == {reason: 1}


def test_a_sample_of_a_shard_may_have_a_name_of_another_encoding(tmp_path, builder):
    """Claim: a name in Latin-1 costs neither the sample nor the run, which draws masks by it."""
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name, data in {"caf\xe9.png": _png(), "caf\xe9.txt": b"a cat"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    found = source_rows(SourceSettings("s", str(tmp_path), "webdataset"), "warmup", seed=0)
    assert [row.row_id for row in found.rows] == ["s/s/caf\\xe9"] and not found.dropped
    corruption = CorruptionSettings(seed=0, text_mask_ratio=0.5)
    assert builder.warmup(found.rows[0], corruption, epoch=0).input_ids.size > 0


def test_a_link_in_a_shard_is_counted_and_never_followed(tmp_path):
    tar_of(_samples(), tmp_path / "s.tar", link="zzz.png")
    found = source_rows(SourceSettings("s", str(tmp_path), "webdataset"), "contrastive", seed=0)
    assert len(found.rows) == 40 and found.dropped == {"unsafe_member": 1}


def test_text_of_another_encoding_in_parquet_is_counted(tmp_path):
    columns = {name: [row[name] for row in GOOD_PAIRS] for name in GOOD_PAIRS[0]}
    raw = pa.array([text.encode() for text in columns["qry"][:-1]] + [b"caf\xe9"], type=pa.binary())
    strings = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    table = pa.table({name: strings if name == "qry" else values for name, values in columns.items()})
    pq.write_table(table, tmp_path / "original-0.parquet")
    found = source_rows(SourceSettings("s", str(tmp_path), "mmeb-train"), "contrastive", seed=0)
    assert len(found.rows) == 39 and found.dropped == {"qry_not_utf8": 1}


CONTROL = (
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|mask|>",
    "<|vision_start|><|image_pad|><|vision_end|>",
)


@pytest.fixture
def builder(data_folder, model_folder, vision, bundle) -> SampleBuilder:
    pictures = PictureLoader(data_folder, processor=load_processor(model_folder), vision=vision)
    return SampleBuilder(bundle=bundle, vision=vision, pictures=pictures, max_length=512)


@pytest.mark.parametrize("token", CONTROL)
@pytest.mark.parametrize("with_picture", [False, True], ids=["text", "picture"])
def test_control_tokens_in_user_text_stay_text(builder, bundle, token, with_picture):
    """Claim: no text makes an image, a bridge or a mask: control ids are those that the layout has put there."""
    text = f"{MARK} one {token} two" if with_picture else f"one {token} two"
    sample = builder.embedding("s", Content(text, "images/0.png" if with_picture else ""))
    special = [int(i) for i in sample.input_ids if bundle.is_special(np.array([i]))[0]]
    units = sample.feature_rows.size
    expected = [bundle.vision_start_token_id, *[bundle.image_token_id] * units, bundle.vision_end_token_id]
    assert special == (expected if with_picture else []) + [bundle.bridge_token_id]
    assert (units > 0) == with_picture


@pytest.mark.parametrize("text", [f"a sign that says {MARK} on it", "see <|image_2|>", f"{MARK} a cat"])
def test_a_mark_in_a_caption_makes_no_picture(builder, tmp_path, text):
    """Claim: a caption is text: its picture comes once, before it, and the mark of another is none."""
    from megatron_cocoa.data.prepared import CorruptionSettings

    written = write_jsonl(tmp_path / "w.jsonl", [caption(image_path="images/0.png", caption=text)])
    (row,) = read_captions(written).rows
    assert "image_" not in row.caption and row.caption.split() == re.sub(r"<.*?>", " ", text).split()
    nothing = CorruptionSettings(seed=1, text_mask_ratio=0.0, unit_mask_ratio=0.0, mask_at_least_one=False)
    sample = builder.warmup(row, nothing, epoch=0)
    assert len(sample.pictures) == len(sample.grid_thw) == 1


@pytest.mark.parametrize("token", CONTROL)
def test_control_tokens_in_a_caption_are_masked_as_text(builder, bundle, token):
    from megatron_cocoa.data.prepared import CorruptionSettings

    everything = CorruptionSettings(seed=1, text_mask_ratio=1.0, unit_mask_ratio=0.5)
    sample = builder.warmup(CaptionRow("r", "images/0.png", f"a {token} b"), everything, epoch=0)
    assert not bundle.is_special(sample.text_labels).any() and sample.text_labels.size > 2
