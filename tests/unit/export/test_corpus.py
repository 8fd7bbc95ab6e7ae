"""A corpus in each of its forms, and the shards that are made of it."""

import dataclasses
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from megatron_cocoa.data.row_parsing import checked_content
from megatron_cocoa.export.corpus import Columns, read_corpus
from megatron_cocoa.export.embed_corpus import ShardPlan, embed_shards, prepare_output
from tools.embed import main


def fake_encode(items):
    return np.array([[len(item["text"])] for item in items], dtype=np.float32)


@pytest.mark.parametrize("kind", ["embeddings", "ids"])
def test_damaged_shards_are_made_again(tmp_path, kind):
    """Claim: a shard is kept only if its checksums hold; another corpus or shard size is refused."""
    rows = "".join(json.dumps({"id": str(i), "text": "x" * (i + 1)}) + "\n" for i in range(7))
    (tmp_path / "c.jsonl").write_text(rows)
    corpus = read_corpus(tmp_path / "c.jsonl")
    plan = ShardPlan(tmp_path / "out", 7, 3)
    made_from = {"corpus": corpus.fingerprint()}
    prepare_output(plan, made_from)
    for rank in range(2):
        assert embed_shards(corpus, fake_encode, plan, rank=rank, num_ranks=2, say=str) == 0
    content = {file: file.read_bytes() for file in plan.output.iterdir()}
    assert embed_shards(corpus, None, plan, say=str) == 3, "all are kept, whatever the number of ranks"
    damaged = plan.file(kind, 1)
    damaged.write_bytes(content[damaged][:-1] + b"\1")
    prepare_output(plan, made_from)
    assert embed_shards(corpus, fake_encode, plan, say=str) == 2
    assert {file: file.read_bytes() for file in plan.output.iterdir()} == content
    vectors = np.concatenate([np.load(plan.file("embeddings", shard)) for shard in range(3)])
    assert vectors.ravel().tolist() == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="another shard_size.*was 3, is now 2"):
        prepare_output(ShardPlan(plan.output, 7, 2), made_from)
    with pytest.raises(ValueError, match="another corpus"):
        prepare_output(plan, {"corpus": "other"})
    with pytest.raises(ValueError, match="another instruction .instruction was None, is now 'find: '"):
        prepare_output(plan, made_from | {"instruction": "find: "})


def test_a_run_that_made_no_shard_holds_no_folder(tmp_path):
    """Claim: after a model that could not be loaded the same folder takes another one; what has shards does not."""
    plan = ShardPlan(tmp_path, 1, 1)
    prepare_output(plan, {"model": "wrong"})
    prepare_output(plan, {"model": "right"})
    assert json.loads((tmp_path / "manifest.json").read_text())["model"] == "right"
    plan.file("ids", 0).write_text("")
    with pytest.raises(ValueError, match="holds shards with another model .model was 'right', is now 'wrong'"):
        prepare_output(plan, {"model": "wrong"})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[1]\n", "row 0 is a list"),
        ('{"text": "a"}\n{"txt": "b"}\n', r"row 1 has neither text nor image \(columns found: txt\)"),
        ('{"id": "a", "text": "a"}\n{"id": "a", "text": "b"}\n', "'a' occurs twice"),
        ('{"text": 3}\n', "column text is a int"),
        ('{"text": "half \\ud83d"}\n', r"row '0' holds the character '\\ud83d', which is no Unicode text"),
        ("{\n", "line 1 is not JSON"),
        ("\n", "nothing to embed"),
    ],
)
def test_bad_corpora_are_refused(tmp_path, rows, message):
    """Claim: no row of a corpus is left out in silence."""
    (tmp_path / "c.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=message):
        read_corpus(tmp_path / "c.jsonl")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("field", ["row_id", "text", "image"])
def test_a_column_that_is_named_must_be_there(tmp_path, suffix, field):
    """Claim: a mistyped column is no reason to number the rows, or to embed what the other column holds alone."""
    rows = [{"key": "a", "caption": "x", "file": "x.png"}, {"key": "b", "caption": "y", "file": "y.png"}]
    file = tmp_path / f"c.{suffix}"
    if suffix == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    columns = Columns("key", "caption", "file")
    assert [row.row_id for row in read_corpus(file, columns=columns).rows] == ["a", "b"]
    with pytest.raises(ValueError, match="has no column captoin: name one"):
        read_corpus(file, columns=dataclasses.replace(columns, **{field: "captoin"}))


def test_a_corpus_stays_in_its_folder(tmp_path):
    """Claim: an image path cannot leave the folder of the pictures, nor for one whose name begins with its name."""
    rows = [{"image": "../x.png"}, {"image": f"../{tmp_path.name}-private/x.png"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in range(2):
        with pytest.raises(ValueError, match="leaves the folder"):
            read_corpus(tmp_path / "c.jsonl").item(row)


def test_a_file_name_that_is_no_text_is_named_at_once(tmp_path):
    """Claim: a name in another encoding, which no list of ids can hold, is told before anything is embedded."""
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    with pytest.raises(ValueError, match=r"row 'caf\\udce9.png' holds the character.*rename the file"):
        read_corpus(tmp_path)


def test_left_over_marks_go_as_in_training(tmp_path):
    """Claim: of a row without a picture the text is embedded that training reads; any other text stays as it is."""
    texts = ["<|image_1|>\nWhat is this? ", " What is this?\n", "<|image_1|> What is this?"]
    images = ["", "", "x.png"]
    rows = [{"text": text, "image": image} for text, image in zip(texts, images)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = read_corpus(tmp_path / "c.jsonl")
    found = [corpus.item(row)["text"] for row in range(3)]
    assert found == [checked_content(text, image).text for text, image in zip(texts, images)]
    assert found == ["\nWhat is this? ", texts[1], texts[2]]


def test_a_folder_of_pictures_is_a_corpus(tmp_path, capsys):
    """Claim: pictures are found in subfolders, in order, and what else lies there is counted, links among it."""
    for name in ("b.png", "a/c.jpg", "notes.txt", "elsewhere/d.png"):
        (tmp_path / "corpus" / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (30, 30)).save(tmp_path / "corpus" / name, format="PNG")
    (tmp_path / "corpus" / "elsewhere").rename(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "gone.png").symlink_to(tmp_path / "gone.png")
    corpus = read_corpus(tmp_path / "corpus")
    assert [row.row_id for row in corpus.rows] == ["a/c.jpg", "b.png"]
    assert corpus.passed_over == ("gone.png", "linked", "notes.txt")
    options = {"model": "absent", "corpus": tmp_path / "corpus", "output": tmp_path / "vectors"}
    assert main([f"--{name}={value}" for name, value in options.items()]) == 2
    assert "corpus: 3, no files with a picture's ending (first: gone.png)" in capsys.readouterr().out


ROWS = [
    {"key": "a", "caption": "one", "picture": "x.png", "other": 1.5},
    {"key": "b", "caption": "two", "picture": None, "other": None},
    {"key": "c", "caption": None, "picture": "y.png", "other": 2.5},
] * 5
COLUMNS = Columns("key", "caption", "picture")


def write_parquet(path, rows, **options):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def test_a_parquet_file_is_the_corpus_that_the_same_lines_are(tmp_path):
    """Claim: a parquet file, in several row groups and with columns of other names, missing values and further
    columns, gives the rows, the pictures' folder and the fingerprint of the same rows as JSONL."""
    rows = [row | {"key": f"{row['key']}{i}"} for i, row in enumerate(ROWS)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_parquet(tmp_path / "c.parquet", rows, row_group_size=4)
    first, second = (read_corpus(tmp_path / f"c.{form}", columns=COLUMNS) for form in ("jsonl", "parquet"))
    assert len(first.rows) == 15 and first == second and first.fingerprint() == second.fingerprint()
    numbered = [{name: row[name] for name in ("caption", "picture")} for row in rows]
    write_parquet(tmp_path / "n.parquet", numbered)
    found = read_corpus(tmp_path / "n.parquet", columns=dataclasses.replace(COLUMNS, row_id="id"))
    assert [row.row_id for row in found.rows] == [str(number) for number in range(15)]


def test_a_parquet_corpus_goes_on_where_it_was_stopped(tmp_path):
    """Claim: shards of a parquet corpus that are done are kept, others made, and a changed file is another corpus."""
    path = write_parquet(tmp_path / "c.parquet", [{"id": i, "text": "x" * (i + 1)} for i in range(7)])
    plan = ShardPlan(tmp_path / "out", 7, 2)
    prepare_output(plan, {"corpus": read_corpus(path).fingerprint()})
    embed_shards(read_corpus(path), fake_encode, plan, rank=1, num_ranks=2, say=str)
    assert embed_shards(read_corpus(path), fake_encode, plan, say=str) == 2
    vectors = np.concatenate([np.load(plan.file("embeddings", shard)) for shard in range(4)])
    assert vectors.ravel().tolist() == [1, 2, 3, 4, 5, 6, 7]
    write_parquet(path, [{"id": i, "text": "y" * (i + 1)} for i in range(7)])
    with pytest.raises(ValueError, match="another corpus"):
        prepare_output(plan, {"corpus": read_corpus(path).fingerprint()})


def test_bad_parquet_files_are_refused(tmp_path):
    """Claim: what is no parquet file, lacks the columns or holds something else than text in them is named."""
    (tmp_path / "no.parquet").write_bytes(b"PAR1 not a table")
    with pytest.raises(ValueError, match="no.parquet is not readable parquet"):
        read_corpus(tmp_path / "no.parquet")
    for rows, message in (
        ([{"txt": "a"}], "row 0 has neither text nor image"),
        ([{"text": "a", "image": {"bytes": b"x", "path": "y.png"}}], "row 0: column image is a dict, needed text"),
        ([{"text": "a", "id": None}], "row 0: column id is a NoneType"),
        ([{"text": "a", "id": 1}, {"text": "b", "id": 1}], "the id '1' occurs twice"),
    ):
        with pytest.raises(ValueError, match=message):
            read_corpus(write_parquet(tmp_path / "bad.parquet", rows))
