"""Every format gives the same rows, and sources mix by weight without ever losing or repeating a sample."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cocoa.config import DataSettings, SourceSettings
from megatron_cocoa.data import readers, stored
from megatron_cocoa.data.loader import StageLoader
from megatron_cocoa.data.mixture import BLOCK, MixedOrder
from megatron_cocoa.data.mmeb_train import SUBSETS, is_constant_target, without_instruction
from megatron_cocoa.data.readers import jsonl_records, parquet_records, saved_dataset_records
from megatron_cocoa.data.row_parsing import checked_content
from megatron_cocoa.data.rows import Content
from megatron_cocoa.data.source_list import source_rows, stage_rows
from megatron_cocoa.data.stored import open_picture
from megatron_cocoa.data.webdataset import shard_records
from tests.unit.data.rows import NUM_PICTURES, by_sample, equal_samples, pair, read_pairs, write_jsonl

MMEB_QUERY = "<|image_1|>\nFind an image caption describing the given everyday image.\n"


def captions(data_folder) -> list[dict]:
    return [json.loads(line) for line in (data_folder / "warmup.jsonl").read_text().splitlines()]


def save_dataset(folder, table: pa.Table, *, split: str | None = None) -> None:
    """As ``datasets`` 4 lays out ``Dataset.save_to_disk`` and, with ``split``, ``DatasetDict.save_to_disk``."""
    folder.mkdir(parents=True, exist_ok=True)
    if split is not None:
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": [split]}))
        folder = folder / split
        folder.mkdir()
    names = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
    half = table.num_rows // 2
    for name, part in zip(names, (table.slice(0, half), table.slice(half))):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(part, max_chunksize=5)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def write_jsonl_source(folder, data_folder) -> SourceSettings:
    rows = [row | {"image_path": str(row["image_path"]).removeprefix("images/")} for row in captions(data_folder)]
    write_jsonl(folder / "rows.jsonl", rows)
    return SourceSettings("s", str(folder / "rows.jsonl"), image_root=str(data_folder / "images"))


def write_mmeb_source(folder, data_folder) -> SourceSettings:
    rows = [
        pair("", qry=MMEB_QUERY, qry_image_path=row["image_path"], pos_text=row["caption"])
        for row in captions(data_folder)
    ]
    subset = folder / "MSCOCO_i2t"
    subset.mkdir()
    for index, part in enumerate((rows[:7], rows[7:])):
        table = pa.Table.from_pylist([{k: v for k, v in row.items() if k != "id"} for row in part])
        pq.write_table(table, subset / f"original-{index:05}-of-00002.parquet")
        pq.write_table(table.slice(0, 1), subset / f"diverse_instruction-{index:05}-of-00002.parquet")
    return SourceSettings("s", str(subset), "mmeb-train", split="original", image_root=str(data_folder))


def write_saved_source(folder, data_folder) -> SourceSettings:
    pictures = [
        {"bytes": (data_folder / row["image_path"]).read_bytes(), "path": None} for row in captions(data_folder)
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    texts = [row["caption"] for row in captions(data_folder)]
    save_dataset(folder / "set", pa.table({"image": pa.array(pictures, type=kind), "text": texts}), split="train")
    return SourceSettings("s", str(folder / "set"), "hf-datasets", columns={"image_path": "image", "caption": "text"})


def write_saved_paths_source(folder, data_folder) -> SourceSettings:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = [{"bytes": None, "path": row["image_path"]} for row in captions(data_folder)]
    texts = [row["caption"] for row in captions(data_folder)]
    save_dataset(folder / "set", pa.table({"image_path": pa.array(pictures, type=kind), "caption": texts}))
    return SourceSettings("s", str(folder / "set"), "hf-datasets", image_root=str(data_folder))


def write_shards_source(folder, data_folder) -> SourceSettings:
    rows = captions(data_folder)
    for index, part in enumerate((rows[:10], rows[10:])):
        with tarfile.open(folder / f"{index:04}.tar", "w") as archive:
            for number, row in enumerate(part):
                members = {"png": (data_folder / row["image_path"]).read_bytes(), "txt": row["caption"].encode()}
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"deep/{number:05}.{extension}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return SourceSettings("s", str(folder), "webdataset")


WRITERS = (
    write_jsonl_source,
    write_mmeb_source,
    write_saved_source,
    write_saved_paths_source,
    write_shards_source,
)


@pytest.fixture
def make(settings, bundle, architecture):
    def build(stage, data, *, rank=0, size=1):
        place = dict(data_parallel_rank=rank, data_parallel_size=size)
        return StageLoader(stage, replace(settings, data=data), bundle=bundle, architecture=architecture, **place)

    return build


def pictures_and_texts(loader, number):
    """Unmasked content of each sample, whatever the rows are called: lengths, and pixels that are no noise."""
    found = Counter()
    for _ in range(number):
        for sample in by_sample(loader.next_step()).values():
            pixels = sample[4]
            found[(tuple(sample[1].tolist()), pixels.double().sum().item())] += 1
    return found


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("workers", [0, 1])
def test_every_format_gives_the_same_samples(make, data_folder, tmp_path, writer, workers):
    """Claim: pairs of the same pictures and captions are the same samples, bit for bit, whatever they are read from."""
    query = MMEB_QUERY if writer is write_mmeb_source else "<|image_1|>"
    plain = [
        pair(row["id"], qry=query, qry_image_path=row["image_path"], pos_text=row["caption"])
        for row in captions(data_folder)
    ]
    reference = SourceSettings("r", str(write_jsonl(tmp_path / "c.jsonl", plain)), image_root=str(data_folder))
    folder = tmp_path / "source"
    folder.mkdir()
    source = writer(folder, data_folder)
    steps = NUM_PICTURES // 8
    loaders = [make("contrastive", DataSettings(sources=(s,), num_workers=workers)) for s in (reference, source)]
    expected, found = (pictures_and_texts(loader, steps) for loader in loaders)
    assert sum(found.values()) == 2 * NUM_PICTURES and expected == found
    for loader in loaders:
        loader.close()


def test_shards_may_be_links(make, data_folder, tmp_path):
    """Claim: the hub's cache, whose files are links to blobs beside the folder, serves as it is."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    source = write_shards_source(tmp_path / "blobs", data_folder)
    expected = pictures_and_texts(make("contrastive", DataSettings(sources=(source,))), 3)
    for index in range(2):
        (tmp_path / "snapshot" / f"{index:04}.tar").symlink_to(f"../blobs/{index:04}.tar")
    linked = replace(source, path=str(tmp_path / "snapshot"))
    assert pictures_and_texts(make("contrastive", DataSettings(sources=(linked,))), 3) == expected


@pytest.mark.parametrize("writer", WRITERS)
def test_every_format_serves_every_stage(data_folder, tmp_path, writer):
    source = writer(tmp_path, data_folder)
    for stage in ("warmup", "bridge", "contrastive"):
        found = source_rows(source, stage, seed=0)
        assert len(found.rows) == NUM_PICTURES and not found.dropped
        assert len({row.row_id for row in found.rows}) == NUM_PICTURES
        assert all(row.row_id.startswith("s/") and row.source == "s" for row in found.rows)


MMEB_ROWS = {
    "MSCOCO_t2i": (
        "Find me an everyday image that matches the given caption: a small dog.\n",
        "",
        "<|image_1|>\nRepresent the given image.\n",
        "b.jpg",
    ),
    "VisualNews_t2i": (
        "Retrieve an image of this news caption. A man speaks.\n",
        "",
        "<|image_1|>\nRepresent the given image.\n",
        "b.jpg",
    ),
    "VisDial": (
        "Represent the given dialogue about an image, which is used for image retrieval: Q:a child?\nA:no\n",
        "",
        "<|image_1|>\nRepresent the given image\n",
        "b.jpg",
    ),
    "WebQA": (
        "<|image_1|>\nFind a Wikipedia image that answers this question: Which part?\n",
        "",
        "<|image_1|>\nRepresent the given Wikipedia image with related text information: A leaf.\n",
        "b.jpg",
    ),
    "CIRR": (
        "<|image_1|>\nGiven an image, find a similar everyday image with the described changes: red\n",
        "a.jpg",
        "<|image_1|>\nRepresent the given image.\n",
        "b.jpg",
    ),
    "MSCOCO": (
        '<|image_1|>\nSelect the portion of the image that isolates the object labeled as "dog"\n',
        "a.jpg",
        "<|image_1|>\nRepresent the given cropped image of the object\n",
        "b.jpg",
    ),
    "ImageNet_1K": ("<|image_1|>\nRepresent the given image for classification\n", "a.jpg", "plane", ""),
}


def test_mmeb_train_rows_follow_the_rules_of_each_stage(tmp_path):
    """Claim: with the published prompts of each kind of subset, rows are flipped, dropped and kept as they should."""
    names = ("qry", "qry_image_path", "pos_text", "pos_image_path")
    rows = [dict(zip(names, values)) for values in MMEB_ROWS.values()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "original-00000-of-00001.parquet")
    source = SourceSettings("s", str(tmp_path), "mmeb-train")
    bridge = source_rows(source, "bridge", seed=0)
    assert [row.target.text for row in bridge.rows] == [
        "a small dog.",
        "A man speaks.",
        "Q:a child?\nA:no",
        "Which part?",
        "plane",
    ]
    assert bridge.flipped == 4 and bridge.dropped == {"image_to_image": 2}
    assert all(not row.target.images and len(row.query.images) == 1 for row in bridge.rows)
    warmup = source_rows(source, "warmup", seed=0)
    assert [row.caption for row in warmup.rows] == [row.target.text for row in bridge.rows]
    assert warmup.dropped == {"several_pictures": 2}
    contrastive = source_rows(source, "contrastive", seed=0)
    assert len(contrastive.rows) == 7 and contrastive.rows[3].query.text == (
        "\nFind a Wikipedia image that answers this question: Which part?\n"
    ), "of a prompt whose picture is missing the mark alone goes, as in MoCa's code"


@pytest.mark.parametrize("writer", [write_saved_source, write_shards_source])
@pytest.mark.parametrize("is_gone", [False, True], ids=["cut", "gone"])
@pytest.mark.parametrize("image_size", [70, None], ids=["found-by-reading", "found-by-the-header"])
def test_an_archive_that_is_lost_under_way_costs_its_rows(
    settings, bundle, architecture, data_folder, tmp_path, writer, is_gone, image_size
):
    """Claim: a shard or table that is cut or removed after its rows were read is treated like any broken picture."""
    source = writer(tmp_path, data_folder)
    stage = replace(settings.contrastive, image_size=image_size)
    settings = replace(settings, data=DataSettings(sources=(source,)), contrastive=stage)
    place = dict(data_parallel_rank=0, data_parallel_size=1)
    loader = StageLoader("contrastive", settings, bundle=bundle, architecture=architecture, **place)
    # As in another process: a table that this one has mapped stays as it is.
    stored._mapped.cache_clear()
    first = sorted([*tmp_path.rglob("*.tar"), *tmp_path.rglob("*.arrow")])[0]
    whole = first.read_bytes()
    first.unlink()
    if not is_gone:
        first.write_bytes(whole[: len(whole) // 3])
    assert sum(len(batch.sample_ids) for batch in loader.next_step()) == 16
    reason = "missing_picture" if is_gone else "unreadable_picture"
    assert loader.num_skipped() == loader.statistics()[f"skipped/{reason}"] > 0


def test_the_published_subsets_and_constants():
    assert len(SUBSETS) == len(set(SUBSETS)) == 20 and "ImageNet_1K" in SUBSETS
    published = ("image", "image and the related text", "cropped image of the object", "Wikipedia image")
    instructions = [f"Represent the given {what}." for what in published]
    related = "Represent the given Wikipedia image with related text information:"
    for text in (*instructions, related, "represent the given IMAGE", "", " Represent  the given image. "):
        assert is_constant_target(text)
    assert not is_constant_target("Represent the given image with a dog")
    assert without_instruction("A dog on a Retrieve an image of this news caption.") == (
        "A dog on a Retrieve an image of this news caption."
    )


IMG2DATASET = {"url": "http://x/1.jpg", "key": "000", "status": "success", "width": 9, "exif": "{}"}
PICTURE_TEXT = {"image_path": "picture", "caption": "text"}


@pytest.mark.parametrize(
    ("members", "columns"),
    [
        ({"jpg": b"x", "txt": b"a cat", "json": IMG2DATASET | {"caption": "a cat"}}, {}),
        ({"jpg": b"x", "txt": b"a cat", "json": IMG2DATASET}, {}),
        ({"jpg": b"x", "txt": b"alt", "json": IMG2DATASET | {"long": "a cat"}}, {"caption": "long"}),
        ({"0.png": b"?", "jpg": b"x", "json": {"picture": "jpg", "text": "a cat"}}, PICTURE_TEXT),
    ],
    ids=["img2dataset", "json-without-a-caption", "another-caption", "named-in-another-column"],
)
def test_a_shards_json_may_describe_its_only_picture(tmp_path, members, columns):
    """Claim: shards as img2dataset writes them are read, and `columns` serves for captions and pictures of shards."""
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for extension, data in members.items():
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            info = tarfile.TarInfo(f"000.{extension}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    source = SourceSettings("s", str(tmp_path), "webdataset", columns=columns)
    for stage in ("warmup", "bridge"):
        (row,) = source_rows(source, stage, seed=0).rows
        picture, text = (row.image_path, row.caption) if stage == "warmup" else (row.query.image_path, row.target.text)
        assert text == "a cat" and open_picture(picture, tmp_path).read() == b"x"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_in_every_form_of_tar(tmp_path, form):
    """Claim: names that a header holds in one or two parts or not at all, and folders between them, lose no sample."""
    keys = ["0", "a/b.c/1", "café/ñ", "x" * 90, f"{'y' * 80}/{'z' * 80}"]
    keys += [] if form == tarfile.USTAR_FORMAT else ["w" * 300]
    with tarfile.open(tmp_path / "s.tar", "w", format=form) as archive:
        for number, key in enumerate(keys):
            folder = tarfile.TarInfo(f"folder{number}")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for kind, content in (("jpg", b"picture" * 200 * number), ("txt", f"caption {number}".encode())):
                member = tarfile.TarInfo(f"{key}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    found = dict(shard_records(tmp_path))
    assert list(found) == [f"s/{key}" for key in keys]
    for number, record in enumerate(found.values()):
        assert record["caption"] == f"caption {number}"
        assert open_picture(record["image_path"], tmp_path).read() == b"picture" * 200 * number


def test_max_rows_draws_the_same_rows_each_time(tmp_path, data_folder):
    source = replace(write_jsonl_source(tmp_path, data_folder), max_rows=5)
    first, again = (source_rows(source, "warmup", seed=3) for _ in range(2))
    assert first.rows == again.rows and len(first.rows) == 5
    assert first.dropped == {"over_max_rows": NUM_PICTURES - 5}
    assert source_rows(source, "warmup", seed=4).rows != first.rows


def test_max_rows_draws_anew_for_each_source_and_stage(tmp_path, data_folder):
    """Claim: sources of equally many rows do not all lose the same places, nor does one in every stage."""
    source = replace(write_jsonl_source(tmp_path, data_folder), max_rows=5)
    other = replace(source, name="t")
    found = [source_rows(*which, seed=3).rows for which in ((source, "warmup"), (other, "warmup"), (source, "bridge"))]
    drawn = {tuple(row.row_id.partition("/")[2] for row in rows) for rows in found}
    assert len(drawn) == 3 and all(len(rows) == 5 for rows in drawn)


def test_a_renamed_column_is_not_read_under_its_old_name(tmp_path):
    """Claim: where `columns` names another column, one that has the usual name does not fill in for it."""
    rows = [{"image_path": "a.png", "caption": "no", "text": f"text {i}"} for i in range(30)]
    path = write_jsonl(tmp_path / "c.jsonl", [*rows, {"image_path": "a.png", "caption": "no"}])
    found = source_rows(SourceSettings("s", str(path), columns={"caption": "text"}), "warmup", seed=1)
    assert [row.caption for row in found.rows] == [row["text"] for row in rows]
    assert found.dropped == {"caption_missing": 1}


def test_columns_serve_for_those_that_mmeb_train_needs(tmp_path):
    """Claim: parquet files in MMEB-train's form may name its columns otherwise."""
    rows = [pair("", pos_text=f"answer {i}") for i in range(3)]
    table = pa.Table.from_pylist([{"question": f"question {i}"} | row for i, row in enumerate(rows)])
    pq.write_table(table.drop_columns(["id", "qry"]), tmp_path / "train-00000-of-00001.parquet")
    source = SourceSettings("s", str(tmp_path), "mmeb-train", columns={"qry": "question"})
    found = source_rows(source, "contrastive", seed=1).rows
    assert [(row.query.text, row.target.text) for row in found] == [(f"question {i}", f"answer {i}") for i in range(3)]


def test_pictures_of_a_subset_lie_beside_it(tmp_path):
    """Claim: without ``image_root`` paths of MMEB-train's rows are relative to the folder above the subset's."""
    (tmp_path / "SUN397").mkdir()
    table = pa.Table.from_pylist([pair("", qry="<|image_1|>", qry_image_path="images/a.jpg", pos_text="a")])
    pq.write_table(table.drop_columns(["id"]), tmp_path / "SUN397" / "train-00000-of-00001.parquet")
    (row,) = source_rows(SourceSettings("s", str(tmp_path / "SUN397"), "mmeb-train"), "contrastive", seed=1).rows
    assert open_picture(row.query.image_path, tmp_path / "elsewhere") == tmp_path / "images" / "a.jpg"


def test_a_split_of_a_saved_dataset_is_chosen(tmp_path):
    """Claim: of several splits the named one is read, and none where none is named."""
    for split in ("train", "test"):
        save_dataset(tmp_path, pa.table({"image_path": ["a.png"] * 2, "caption": [split] * 2}), split=split)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    for split in ("train", "test"):
        source = SourceSettings("s", str(tmp_path), "hf-datasets", split=split)
        assert [row.caption for row in source_rows(source, "warmup", seed=1).rows] == [split] * 2
    with pytest.raises(ValueError, match="has the splits train, test: set `split` to one of them"):
        source_rows(replace(source, split=None), "warmup", seed=1)


def test_a_caption_is_the_target_of_its_picture(tmp_path):
    """Claim: in stage ``contrastive`` a record of a picture and a caption asks with the picture."""
    path = write_jsonl(tmp_path / "c.jsonl", [{"id": "a", "image_path": "a.png", "caption": "a cat"}])
    (row,) = read_pairs(path).rows
    assert (row.query, row.target) == (Content("<|image_1|>", "a.png"), Content("a cat"))


def test_rows_are_named_by_their_place_in_the_file(tmp_path, monkeypatch):
    """Claim: over several batches of a file no name comes twice: masks and negatives are drawn by it."""
    monkeypatch.setattr(readers, "_BATCH_ROWS", 3)
    table = pa.table({"caption": [f"caption {i}" for i in range(11)]})
    pq.write_table(table, tmp_path / "p.parquet")
    save_dataset(tmp_path / "set", table)
    expected = [(f"p:{i}", f"caption {i}") for i in range(11)]
    assert [(name, row["caption"]) for name, row in parquet_records([tmp_path / "p.parquet"])] == expected
    first, second = (f"data-{i:05}-of-00002" for i in range(2))
    names = [*(f"{first}:{i}" for i in range(5)), *(f"{second}:{i}" for i in range(6))]
    saved = [(name, row["caption"]) for name, row in saved_dataset_records(tmp_path / "set")]
    assert saved == [(name, text) for name, (_, text) in zip(names, expected)]


def test_several_pictures_stand_where_the_text_shows_them(make, data_folder, tmp_path):
    """Claim: ``<|image_2|>`` before ``<|image_1|>`` puts the second picture first, each with its own grid."""
    row = pair("two", qry="see <|image_2|> then <|image_1|>", pos_text="both") | {
        "qry_image_path": ["images/0.png", "images/1.png"]
    }
    fill = [pair(f"f{i}", qry=f"text {i}", pos_text=f"answer {i}") for i in range(7)]
    path = write_jsonl(tmp_path / "c.jsonl", [row, *fill])
    data = DataSettings(sources=(SourceSettings("s", str(path), image_root=str(data_folder)),))
    single = {
        key: pair("one", qry=f"see <|image_1|> {key}", qry_image_path=f"images/{key}.png", pos_text="x") for key in "01"
    }
    both = by_sample(make("contrastive", data).next_step())["s/two#query"]
    sides = []
    for key, one in single.items():
        path = write_jsonl(tmp_path / f"{key}.jsonl", [one, *fill])
        source = SourceSettings("s", str(path), image_root=str(data_folder))
        sides.append(by_sample(make("contrastive", DataSettings(sources=(source,))).next_step())["s/one#query"])
    assert both[0] == sides[1][0] + sides[0][0]
    np.testing.assert_array_equal(both[4], np.concatenate([sides[1][4], sides[0][4]]))


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("a", "", Content("a")),
        ("<|image_1|>\na\n", "", Content("\na\n")),
        ("<|image_7|>a <|image_1|>", "", Content("a ")),
        ("", "x.png", Content("<|image_1|>", "x.png")),
        ("", ("x.png", "y.png"), Content("<|image_1|><|image_2|>", "x.png", ("y.png",))),
        ("<|image_2|>b<|image_1|>", ("x.png", "y.png"), Content("<|image_2|>b<|image_1|>", "x.png", ("y.png",))),
        ("", ("x", "y", "z"), Content("<|image_1|><|image_2|><|image_3|>", "x", ("y", "z"))),
    ],
)
def test_marks_and_pictures_agree(text, images, expected):
    assert checked_content(text, images) == expected


def weighted(parts, **options):
    return MixedOrder([(str(i), rows, weight) for i, (rows, weight) in enumerate(parts)], seed=7, stage="s", **options)


def test_shares_follow_the_weights_and_never_drift():
    """Claim: after every whole block a source has had its share to one sample, however long the stream."""
    parts = [(1000, 1.0), (37, 0.25), (90_000, 3.1)]
    order = weighted(parts)
    total = sum(weight for _, weight in parts)
    for blocks in (1, 2, 57):
        seen = order._before(blocks)
        assert sum(seen) == blocks * BLOCK
        assert all(abs(count - blocks * BLOCK * w / total) <= 1 for count, (_, w) in zip(seen, parts))


def test_each_source_of_a_mixture_goes_through_all_its_rows_before_it_repeats_one():
    order = weighted([(100, 1.0), (7, 1.0), (1000, 2.0)])
    rows = [order.at(i) for i in range(3 * BLOCK)]
    for start, size in ((0, 100), (100, 7), (107, 1000)):
        own = [row - start for _, row in rows if start <= row < start + size]
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_a_mixture_is_found_at_any_position_without_a_state():
    straight = [weighted([(50, 1.0), (20, 0.5)]).at(i) for i in range(200)]
    fresh = weighted([(50, 1.0), (20, 0.5)])
    assert [fresh.at(i) for i in (199, 3, 150)] == [straight[i] for i in (199, 3, 150)]
    assert all(50 <= min(fresh.substitutes(i)) for i in range(200) if straight[i][1] >= 50)


def test_shares_of_a_mixture_are_counted_once_for_a_block_of_positions(monkeypatch):
    """Claim: a position costs no arithmetic of fractions: with twenty sources that was half of the time of a plan."""
    order, products = weighted([(1000, 1.0 + i) for i in range(20)], batch_size=64), []
    multiply = Fraction.__mul__
    monkeypatch.setattr(Fraction, "__mul__", lambda a, b: products.append(a) or multiply(a, b))
    for position in range(2 * BLOCK):
        order.at(position)
    # Those of a few blocks, and of the search for the steps that two epochs of a source share.
    assert 0 < len(products) < 2 * BLOCK


def test_a_weight_that_would_never_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"\['1'\] would get less than one in 4096"):
        weighted([(50, 1.0), (20, 1e-5)])


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)])
def test_mixed_sources_resume_at_another_data_parallel_size(make, data_folder, tmp_path, sizes):
    first = SourceSettings("a", str(data_folder), weight=2.0)
    rows = write_jsonl(tmp_path / "b.jsonl", [pair(f"{i}", qry=f"q {i}", pos_text=f"p {i}") for i in range(9)])
    data = DataSettings(sources=(first, SourceSettings("b", str(rows), weight=1.0)))
    before, after = ([make("contrastive", data, rank=r, size=s) for r in range(s)] for s in sizes)
    for _ in range(3):
        states = [loader.next_step() and loader.state_dict() for loader in before]
    assert json.loads(json.dumps(states[0]))["sources"] == [["a", 48, 2.0], ["b", 9, 1.0]]
    for loader in after:
        loader.load_state_dict(json.loads(json.dumps(states[0])))
    for _ in range(3):
        expected, found = (by_sample([b for x in group for b in x.next_step()]) for group in (before, after))
        assert equal_samples(expected, found)


def test_sources_without_weights_make_one_epoch_of_all_rows(make, data_folder, tmp_path):
    rows = write_jsonl(tmp_path / "b.jsonl", [pair(f"{i}", qry=f"q {i}", pos_text=f"p {i}") for i in range(8)])
    data = DataSettings(sources=(SourceSettings("a", str(data_folder)), SourceSettings("b", str(rows))))
    loader = make("bridge", data)
    names = [name for _ in range(4) for batch in loader.next_step() for name in batch.sample_ids]
    expected = [f"a/row-{i}" for i in range(NUM_PICTURES)] + [f"b/{i}" for i in range(8)]
    assert sorted(names) == sorted(expected) and loader.statistics()["rows"] == 32


@pytest.mark.parametrize("number", [1, 3])
def test_rows_of_sources_are_in_memory_once(tmp_path, number):
    """Claim: neither naming a source's rows nor joining sources takes a second copy of them."""
    caption = "x" * 2000
    rows = [{"id": f"{i}", "image_path": f"{i}.jpg", "caption": f"{caption} {i}"} for i in range(1000)]
    files = [write_jsonl(tmp_path / f"{i}.jsonl", rows) for i in range(number)]
    data = DataSettings(sources=tuple(SourceSettings(f"s{i}", str(file)) for i, file in enumerate(files)))
    stage_rows("warmup", data, seed=0)
    tracemalloc.start()
    found = stage_rows("warmup", data, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A buffer that grows has up to an eighth to spare.
    assert found.parts[-1] == (f"s{number - 1}", 1000, None) and len(found.rows) == 1000 * number
    assert peak < 1.25 * found.rows.nbytes


def test_settings_of_sources_are_checked():
    good = SourceSettings("a", "x")
    for sources, message in (
        ((good, good), "each must occur once"),
        ((good, SourceSettings("b", "x", weight=1.0)), "give each a positive one, or none"),
        ((SourceSettings("b", "x", weight=-1.0),), "give each a positive one"),
        ((SourceSettings("b", "x", stages=("later",)),), "names the stage"),
        ((SourceSettings("b", "x", max_rows=0),), "needs 1 or more"),
        ((SourceSettings("b", "x", split="train"),), "has no effect on format jsonl"),
    ):
        with pytest.raises(ValueError, match=message):
            DataSettings(sources=sources)
    with pytest.raises(ValueError, match="none of data.sources feeds stage bridge"):
        stage_rows("bridge", DataSettings(sources=(SourceSettings("a", "x", stages=("warmup",)),)), seed=0)


def test_a_byte_order_mark_costs_no_row(tmp_path):
    """Claim: the first line of a file that an editor has put its mark in front of is a row like the others."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a"}\n{"id": "b"}\n', encoding="utf-8-sig")
    assert list(jsonl_records(path)) == [("rows:1", {"id": "a"}), ("rows:2", {"id": "b"})]
