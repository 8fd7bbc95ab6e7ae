"""Raw data becomes a stage's file that trains on the same samples, with a manifest that adds up."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace

import pytest

from megatron_cocoa.config import DataSettings, SourceSettings
from megatron_cocoa.data.prepare import Preparation, prepare, sources_under
from megatron_cocoa.data.source_list import source_rows, stage_rows
from tests.unit.data.rows import NUM_PICTURES, pair, write_jsonl
from tests.unit.data.test_readers import WRITERS, make, pictures_and_texts, write_mmeb_source  # noqa: F401
from tools.prepare_data import main


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("stage", ["bridge", "contrastive"])
def test_prepared_files_hold_the_same_samples_as_the_raw_ones(make, data_folder, tmp_path, writer, stage):  # noqa: F811
    """Claim: training on what was prepared is training on the raw data, bit for bit, for every format."""
    raw = tmp_path / "raw"
    raw.mkdir()
    source = writer(raw, data_folder)
    plan = Preparation(stage, (source,), tmp_path / "out", copy_pictures=True, check="decode")
    manifest = prepare(plan, progress=False)
    assert manifest["rows"] == NUM_PICTURES and manifest["pictures"]["distinct"] == NUM_PICTURES
    loaders = [make(stage, DataSettings(sources=(source,))), make(stage, DataSettings(path=str(tmp_path / "out")))]
    seen = [
        Counter(row.target.text for row in stage_rows(stage, data, seed=0).rows)
        for data in (DataSettings(sources=(source,)), DataSettings(path=str(tmp_path / "out")))
    ]
    assert seen[0] == seen[1]
    if stage == "contrastive":
        found = [pictures_and_texts(loader, NUM_PICTURES // 8) for loader in loaders]
        assert found[0] == found[1]


def test_pictures_that_are_not_copied_keep_their_paths(data_folder, tmp_path):
    """Claim: paths are those of the source, folders and all, so that its ``image_root`` serves the prepared file."""
    prepare(Preparation("contrastive", (SourceSettings("s", str(data_folder)),), tmp_path), progress=False)
    columns = ("qry", "qry_image_path", "pos_text", "pos_image_path")
    raw, found = (lines(folder / "contrastive.jsonl") for folder in (data_folder, tmp_path))
    assert [[row[name] for name in columns] for row in found] == [[row[name] for name in columns] for row in raw]


def test_prepared_captions_are_the_sources_own_draw(data_folder, tmp_path):
    """Claim: with ``max_rows`` the seed draws as in training, and a row keeps the name of its source."""
    source = SourceSettings("s", str(data_folder), max_rows=9)
    prepare(Preparation("warmup", (source,), tmp_path, seed=5), progress=False)
    drawn = source_rows(source, "warmup", seed=5).rows
    found = lines(tmp_path / "warmup.jsonl")
    assert [(row["id"], row["caption"], row["source"]) for row in found] == [(r.row_id, r.caption, "s") for r in drawn]


def test_the_manifest_adds_up(data_folder, tmp_path):
    """Claim: rows in, rows out and rows rejected agree, each rejected row is named, and checksums are the files'."""
    good = [
        pair(f"g{i}", qry="<|image_1|> what", qry_image_path=f"images/{i}.png", pos_text=f"cat {i}") for i in range(20)
    ]
    odd = [
        pair("turned", qry="a caption", pos_text="<|image_1|>", pos_image_path="images/20.png"),
        pair(
            "both",
            qry="<|image_1|>",
            qry_image_path="images/1.png",
            pos_text="<|image_1|>",
            pos_image_path="images/2.png",
        ),
        pair("gone", qry="<|image_1|> what", qry_image_path="images/none.png", pos_text="cat"),
        pair("out", qry="<|image_1|> what", qry_image_path="../secret.png", pos_text="cat"),
        "{broken",
    ]
    path = write_jsonl(tmp_path / "raw.jsonl", good + odd)
    source = SourceSettings("raw", str(path), image_root=str(data_folder))
    manifest = prepare(Preparation("bridge", (source,), tmp_path / "out"), progress=False)
    reasons = {"image_to_image": 1, "missing_picture": 1, "outside_data_folder": 1, "not_json": 1}
    assert manifest["rejected"] == reasons == manifest["inputs"][0]["rejected"]
    assert manifest["rows"] == 21 and manifest["flipped"] == 1
    assert manifest["rows"] + sum(reasons.values()) == len(good) + len(odd)
    rejected = lines(tmp_path / "out" / "bridge.rejected.jsonl")
    assert {(row["id"], row["reason"]) for row in rejected} == {
        ("raw/both", "image_to_image"),
        ("raw/gone", "missing_picture"),
        ("raw/out", "outside_data_folder"),
        ("raw/raw:25", "not_json"),
    }
    for name, facts in manifest["files"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert json.loads((tmp_path / "out" / "bridge.manifest.json").read_text()) == manifest


def test_nothing_half_written_carries_a_final_name(data_folder, tmp_path, monkeypatch):
    source = SourceSettings("raw", str(data_folder), image_root=str(data_folder))
    monkeypatch.setattr("megatron_cocoa.data.prepare.sha256_of", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(Preparation("warmup", (source,), tmp_path / "out"), progress=False)
    assert not list((tmp_path / "out").iterdir())


def test_where_no_picture_is_found_the_first_is_named(data_folder, tmp_path):
    """Claim: a wrong --image-root is seen in the message: the row, and the path that was looked for."""
    source = SourceSettings("raw", str(data_folder), image_root=str(tmp_path))
    looked_for = f"{tmp_path.resolve() / 'images'}/.* is not a file"
    with pytest.raises(ValueError, match=rf"all were rejected .*missing_picture.*, the first one raw/.*: {looked_for}"):
        prepare(Preparation("warmup", (source,), tmp_path / "out"), progress=False)


def test_an_earlier_file_is_kept_unless_it_may_be_replaced(data_folder, tmp_path):
    source = SourceSettings("raw", str(data_folder), image_root=str(data_folder))
    plan = Preparation("warmup", (source,), tmp_path / "out")
    prepare(plan, progress=False)
    with pytest.raises(ValueError, match="warmup.jsonl exists"):
        prepare(plan, progress=False)
    assert prepare(replace(plan, overwrite=True), progress=False)["rows"] == NUM_PICTURES


@pytest.mark.parametrize("stage", ["warmup", "bridge", "contrastive"])
def test_the_tool_prepares_mmeb_train_for_each_stage(data_folder, tmp_path, capsys, stage):
    """Claim: the documented command gives rows that the stage's own reader takes."""
    write_mmeb_source(tmp_path, data_folder)
    argv = ["--stage", stage, "--from", "mmeb-train", "--input", str(tmp_path), "--split", "original"]
    argv += ["--image-root", str(data_folder), "--max-rows", "9", "--output", str(tmp_path / "out")]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert '"rows": 9' in printed and "sources:" in printed
    entry = SourceSettings("again", str(tmp_path / "out"), image_root=str(data_folder))
    found = source_rows(entry, stage, seed=0)
    assert len(found.rows) == 9 and all(row.row_id.startswith("again/MSCOCO_i2t/") for row in found.rows)
    assert main(argv) == 2 and "exists" in capsys.readouterr().err


def test_subsets_are_found_by_their_folders(data_folder, tmp_path):
    write_mmeb_source(tmp_path, data_folder)
    (tmp_path / "images").mkdir()
    found = sources_under(tmp_path, "mmeb-train", split="original")
    assert [(source.name, source.image_root) for source in found] == [("MSCOCO_i2t", str(tmp_path))]
    with pytest.raises(ValueError, match="has no subset NIGHTS"):
        sources_under(tmp_path, "mmeb-train", subsets=["NIGHTS"])
    with pytest.raises(ValueError, match="--subsets NIGHTS has no effect here"):
        sources_under(tmp_path, "webdataset", subsets=["NIGHTS"])
