"""Hard negatives, against choices worked out by hand and a plain loop."""

import importlib.util
import json
import re
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch

from megatron_cocoa.export import same_pictures
from megatron_cocoa.export.corpus import Corpus, CorpusRow
from megatron_cocoa.export.embed_corpus import ShardPlan, embed_shards, prepare_output
from megatron_cocoa.export.hard_negatives import Content, MiningOptions, mine
from megatron_cocoa.export.nearest import _merge, nearest
from megatron_cocoa.export.pair_files import read_pairs_file, write_pairs_file
from megatron_cocoa.export.shards import ShardedVectors, check_same_model, read_shards

TOOL = Path(__file__).resolve().parents[2] / "tools" / "mine_hard_negatives.py"


def unit(rows) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def angles(*degrees: float) -> np.ndarray:
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def texts(*names: str) -> list[Content]:
    return [Content(name, "") for name in names]


def test_hand_worked_choices():
    """Claim: of neighbours at known angles the right one is taken, and each other is passed over for its reason.

    Query 0 has its positive at 30 degrees. Nearer or nearly as near: "dog" at 10 (within the margin), "Cat " at 20
    (the positive's own words), "kitten" at 40 (right for row 3's equal query), "a" at 50 (the query itself). The
    nearest that is left is "fox" at 60.
    """
    queries = texts("a", "b", "c", "a", "e", "f")
    positives = texts("cat", "dog", "Cat ", "kitten", "a", "fox")
    targets = angles(30, 10, 20, 40, 50, 60)
    found = mine(queries, positives, angles(0, 0, 0, 0, 0, 0), targets, MiningOptions(margin=0.05))
    assert found.negatives[0] == [Content("fox", "")]
    assert found.scores[0] == [pytest.approx(0.5)]
    assert found.negatives[5] == [] and found.counts["empty_rows"] >= 1, "nothing is farther than row 5's own"
    one = mine(queries[:1], positives[:1], angles(0), targets[:1], MiningOptions())
    assert one.negatives == [[]] and one.counts == {"own_positive": 1, "empty_rows": 1}


def test_pictures_are_told_apart_by_path_not_by_prompt():
    """Claim: picture targets share one prompt and are no equal answers; the query's own picture is none of them."""
    targets = [Content("<|image_1|> Represent the given image.", f"{i}.png") for i in range(4)]
    queries = [Content("<|image_1|> same style?", "1.png"), *texts("x", "y", "z")]
    found = mine(queries, targets, angles(0, 0, 0, 0), angles(5, 40, 60, 80), MiningOptions(num_negatives=2))
    assert found.negatives[0] == [targets[2], targets[3]] and found.counts["is_the_query"] == 1


@pytest.mark.parametrize(("num", "margin", "skip", "depth"), [(3, 0.1, 2, 60), (1, 0.0, 0, 5), (2, 0.3, 0, 40)])
def test_equals_a_plain_loop(num, margin, skip, depth):
    """Claim: on random vectors the choice is that of a loop over all targets sorted by cosine."""
    options = MiningOptions(num, margin, skip, depth)
    rng = np.random.default_rng(0)
    queries, targets = unit(rng.normal(size=(60, 6))), unit(rng.normal(size=(60, 6)))
    names = [f"t{i % 50}" for i in range(60)]
    found = mine(texts(*(f"q{i}" for i in range(60))), texts(*names), queries, targets, options)
    for row in range(60):
        cosines = targets[:50] @ queries[row]
        order = np.argsort(-cosines, kind="stable")[:depth]
        limit = float(targets[row] @ queries[row]) - margin
        wanted = [i for i in order if i != row % 50 and cosines[i] <= limit][skip:][:num]
        assert [content.text for content in found.negatives[row]] == [f"t{i}" for i in wanted]
    again = mine(texts(*(f"q{i}" for i in range(60))), texts(*names), queries, targets, options)
    assert again.negatives == found.negatives and again.counts == found.counts


def test_memory_is_that_of_a_block_of_queries(monkeypatch):
    """Claim: neighbours of a few queries are held at a time, and the choice does not depend on how many."""
    rng = np.random.default_rng(2)
    queries, targets = unit(rng.normal(size=(300, 6))), unit(rng.normal(size=(300, 6)))
    sides = texts(*(f"q{i}" for i in range(300))), texts(*(f"t{i}" for i in range(300)))
    whole = mine(*sides, queries, targets, MiningOptions(2, depth=250))
    # Seven queries with their best and eleven targets at a time, of six numbers each.
    monkeypatch.setattr("megatron_cocoa.export.nearest.QUERY_BYTES", 7 * (6 * 4 + 250 * 8))
    monkeypatch.setattr("megatron_cocoa.export.nearest.TARGET_BYTES", 11 * 6 * 4)
    monkeypatch.setattr("megatron_cocoa.export.hard_negatives.BLOCK_QUERIES", 5)
    tracemalloc.start()
    found = mine(*sides, queries, targets, MiningOptions(2, depth=250))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.negatives == whole.negatives and found.counts == whole.counts
    # A product of another shape sums in another order, which the last decimal may show.
    assert np.concatenate(found.scores) == pytest.approx(np.concatenate(whole.scores), abs=1.1e-6)
    assert peak < 300 * 250 * 8, "less than the places of all neighbours"


def test_equal_scores_keep_the_order_of_the_file():
    """Claim: among equal neighbours the earlier row's target wins."""
    found = mine(texts(*"abcde"), texts(*"vwxyz"), angles(0, 0, 0, 0, 0), angles(0, 50, 50, 50, 50), MiningOptions(2))
    assert found.negatives[0] == texts("w", "x")


def test_ties_at_the_last_neighbour_keep_the_order_of_the_file(monkeypatch):
    """Claim: where equal targets are more than the depth, the earliest are taken, in blocks of any size."""
    wanted = np.arange(20)
    targets = np.repeat(angles(40), 90, axis=0)
    for size in (1, 7, 90):
        monkeypatch.setattr("megatron_cocoa.export.nearest.TARGET_BYTES", size * 2 * 4)
        ((first, places, scores),) = nearest(angles(0, 30), targets, np.arange(90), 20)
        assert first == 0 and (places == wanted).all()
        assert scores == pytest.approx(np.cos(np.radians([[40.0] * 20, [10.0] * 20])), abs=1e-6)


def test_the_nearest_are_those_of_a_sort(monkeypatch):
    """Claim: among more targets than a block holds, those that a sort of all cosines puts first, in its order."""
    rng = np.random.default_rng(3)
    queries, targets = unit(rng.normal(size=(30, 8))), unit(rng.normal(size=(500, 8)))
    among = np.flatnonzero(rng.random(500) < 0.8)
    monkeypatch.setattr("megatron_cocoa.export.nearest.TARGET_BYTES", 40 * 8 * 4)
    monkeypatch.setattr("megatron_cocoa.export.nearest.QUERY_BYTES", 12 * (8 * 4 + 50 * 8))
    cosines = (queries.astype(np.float64) @ targets[among].T.astype(np.float64)).round(6)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :50]
    starts, places, scores = zip(*nearest(queries, targets, among, 50))
    assert starts == (0, 12, 24)
    # To the last decimal: a sum in another order may round to its neighbour.
    assert np.concatenate(scores) == pytest.approx(np.take_along_axis(cosines, order, axis=1), abs=1.1e-6)
    assert (np.concatenate(places) == order).mean() > 0.99


@pytest.mark.parametrize("order", ["chance", "near ties", "each eighth", "growing", "equal"])
def test_a_guess_at_the_last_of_the_best_decides_nothing(order):
    """Claim: whatever the order of the scores, what is kept is what a sort by rounded score and place puts first."""
    rng = np.random.default_rng(5)
    scores = rng.normal(size=(16, 4000)).clip(-3, 3) / 4
    if order == "near ties":
        # Some hundred targets of each rounded score, which a comparison of floats would order otherwise.
        scores = (0.1 + 1e-6 * rng.integers(0, 40, scores.shape)) + rng.uniform(-3e-7, 3e-7, scores.shape)
    elif order == "each eighth":
        scores[:, ::8] += 1
    elif order == "growing":
        scores.sort(axis=1)
    elif order == "equal":
        scores[:] = 0.25
    scores = torch.from_numpy(scores).float()
    keys = torch.full((16, 200), torch.iinfo(torch.int64).min)
    for start, end in ((0, 1700), (1700, 2500), (2500, 4000)):
        _merge(keys, scores[:, start:end], start)
    rounded = (scores * 1e6).round().long().numpy()
    wanted = np.lexsort((np.broadcast_to(np.arange(4000), rounded.shape), -rounded), axis=1)[:, :200]
    assert (-keys.numpy() % 2**32 == wanted).all()


def test_equal_content_is_one_answer_under_any_prompt_and_name():
    """Claim: no other prompt, spelling, row or file name makes a right answer wrong, or one negative two.

    Query 0 has its positive, the picture a.png, at 60 degrees; nearer to it than that lies nothing. Farther lie, in
    this order: a copy of a.png under another prompt, right for an equal query b.png (whose picture is a copy of row
    0's own query's), the query itself as a target, and twice the same wrong picture.
    """
    ask, show = "<|image_1|> what is alike?", "<|image_1|> Represent the given image."
    asked = Content(ask, "q.png"), Content("x", ""), Content(" What IS alike? <|image_1|>", "copy-of-q.png")
    queries = [*asked, *texts("y", "z", "w")]
    positives = [
        Content(show, "a.png"),
        Content("<|image_1|> Picture:", "copy-of-a.png"),
        Content(show, "b.png"),
        Content(show, "copy-of-q.png"),
        Content(show, "c.png"),
        Content("<|image_1|> Picture:", "c.png"),
    ]
    same = {"copy-of-a.png": "a.png", "copy-of-q.png": "q.png"}
    vectors = angles(0, 0, 0, 0, 0, 0), angles(10, 60, 62, 64, 66, 68)
    found = mine(queries, positives, *vectors, MiningOptions(num_negatives=2), same_pictures=same)
    assert found.negatives[0] == [positives[4]]
    alone = mine(queries[:1] * 6, positives, *vectors, MiningOptions(num_negatives=2), same_pictures=same)
    assert alone.negatives == [[]] * 6, "each is right for the very same query"
    spelled = texts("Caf\u00e9  noir", "cafe\u0301 NOIR", "<|image_1|> caf\u00e9 noir", "tea")
    found = mine(texts(*"abcd"), spelled, angles(0, 0, 0, 0), angles(10, 60, 70, 80), MiningOptions(2))
    assert found.negatives[0] == texts("tea") and found.counts["same_answer"] == 0
    assert found.negatives[3] == [], "all of row 3 is nearer than its own"


def test_one_wrong_answer_is_taken_once():
    """Claim: two spellings of a wrong answer give one negative, the nearer one, and leave the place to another."""
    found = mine(texts(*"abcd"), texts("fox", "cat", "Cat", "dog"), angles(0, 0, 0, 0), angles(0, 50, 60, 70),
                 MiningOptions(2))  # fmt: skip
    assert found.negatives[0] == texts("cat", "dog") and found.counts["same_answer"] == 1
    skipped = mine(texts(*"abcd"), texts("fox", "cat", "Cat", "dog"), angles(0, 0, 0, 0), angles(0, 50, 60, 70),
                   MiningOptions(1, skip_top=1))  # fmt: skip
    assert skipped.negatives[0] == texts("dog")


def test_the_relative_margin_is_a_share_of_the_positive():
    """Claim: a candidate must stay below that share of the positive's cosine, the wider of both margins counts, and
    below zero the limit lies below the positive as well."""
    targets = angles(60, 62, 66, 70)  # cosines 0.5, 0.469, 0.407, 0.342

    def first(own: float = 60, **margins) -> list[Content]:
        vectors = angles(0, 0, 0, 0), np.concatenate([angles(own), targets[1:]])
        return mine(texts(*"abcd"), texts(*"wxyz"), *vectors, MiningOptions(**margins)).negatives[0]

    assert first(margin=0.0) == texts("x")
    assert first(margin=0.0, relative_margin=0.1) == texts("y"), "0.469 is above 0.45"
    assert first(margin=0.12, relative_margin=0.1) == texts("z"), "0.407 is above 0.38"
    assert first(margin=0.01, relative_margin=0.25) == texts("z"), "0.407 is above 0.375"
    assert first(own=110, margin=0.0, relative_margin=0.5) == []
    with pytest.raises(ValueError, match="relative_margin is 1.5: needed between 0 and 1"):
        MiningOptions(relative_margin=1.5)


def test_pictures_are_the_same_by_their_bytes(tmp_path, monkeypatch):
    """Claim: copies are found whatever their names, files of one size and one middle are told apart, and only files
    that look alike are read whole."""
    middle = bytes(9000)
    contents = {
        "a.png": b"1" + middle + b"2", "b.png": b"1" + middle + b"3", "sub/a.png": b"1" + middle + b"2",
        "c.png": b"short", "d.png": b"other", "e.png": b"alone in its size",
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    read = []
    whole = same_pictures.sha256_of
    monkeypatch.setattr(same_pictures, "sha256_of", lambda file: read.append(file.name) or whole(file))
    found = same_pictures.same_pictures(["", *contents, "a.png"], tmp_path)
    assert found == {name: "a.png" if name == "sub/a.png" else name for name in contents}
    assert sorted(read) == ["a.png", "a.png", "b.png"]
    with pytest.raises(ValueError, match="absent.png cannot be read .*--image-root"):
        same_pictures.same_pictures(["absent.png", "c.png"], tmp_path)


def test_a_copy_of_the_positive_is_no_negative():
    """Claim: the same picture under another path is not taken, at no margin either; what is below it is."""
    targets = [Content("", f"{i}.png") for i in range(4)]
    vectors = unit(np.random.default_rng(1).normal(size=(4, 768)))
    vectors[1] = vectors[0]
    found = mine(texts(*"abcd"), targets, vectors, vectors, MiningOptions(num_negatives=4, margin=0.0))
    assert targets[1] not in found.negatives[0] and targets[0] not in found.negatives[1]
    assert set(found.negatives[0]) == set(targets[2:]) and found.counts["within_margin"] == 2


def test_options_out_of_range_are_refused():
    """Claim: numbers that make no sense together are refused, with the numbers; so are sides of unequal size."""
    with pytest.raises(ValueError, match="num_negatives is 0"):
        MiningOptions(num_negatives=0)
    with pytest.raises(ValueError, match=r"depth 3 is below num_negatives 2 \+ skip_top 2"):
        MiningOptions(num_negatives=2, skip_top=2, depth=3)
    with pytest.raises(ValueError, match=r"found 2 pairs, query vectors \(1, 2\)"):
        mine(texts("a", "b"), texts("c", "d"), angles(0), angles(0, 1), MiningOptions())


def embed(folder: Path, vectors: np.ndarray, names=None, **made_from) -> Path:
    rows = tuple(CorpusRow(str(i), name, "") for i, name in enumerate(names or ["x"] * len(vectors)))
    plan = ShardPlan(folder, len(vectors), 2)
    prepare_output(plan, made_from)
    left = iter(vectors)
    embed_shards(Corpus(rows, folder), lambda items: np.stack([next(left) for _ in items]), plan, say=lambda line: None)
    return folder


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("mine_hard_negatives", TOOL)
    module = importlib.util.module_from_spec(spec)
    saved = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = saved
    return module


@pytest.mark.parametrize(("suffix", "num"), [("jsonl", 1), ("parquet", 2)])
def test_the_tool_writes_mmeb_train_columns(tmp_path, tool, capsys, suffix, num):
    """Claim: rows and other columns stay, negatives are added in MMEB-train's columns, counts are printed."""
    rows = [
        {"id": str(i), "qry": f"q{i}", "qry_image_path": "", "pos_text": name, "pos_image_path": ""}
        for i, name in enumerate(("cat", "dog", "fox"))
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    queries = embed(tmp_path / "q", angles(0, 60, 90), ["q0", "q1", "q2"])
    targets = embed(tmp_path / "t", angles(0, 60, 90), ["cat", "dog", "fox"])
    output = tmp_path / f"mined.{suffix}"
    arguments = ["--pairs", pairs, "--queries", queries, "--targets", targets, "--output", output]
    arguments += ["--num-negatives", num]
    assert tool.main(list(map(str, arguments))) == 0
    found = read_pairs_file(output)
    assert [{k: row[k] for k in rows[0]} for row in found] == rows
    wanted = [["dog", "fox"], ["fox", "cat"], ["dog", "cat"]]
    assert [row["neg_text"] for row in found] == (wanted if num == 2 else [w[0] for w in wanted])
    assert f"full_rows: 3 of 3\nshort_rows: 0 of 3\nempty_rows: 0 of 3\nchosen: {3 * num}" in capsys.readouterr().out
    assert tool.main(list(map(str, arguments))) == 2 and "--overwrite" in capsys.readouterr().err
    nowhere = ["--pairs=x.jsonl", "--queries=x", "--targets=x", "--output=mined.csv"]
    assert tool.main(nowhere) == 2 and "mined.csv is neither .parquet nor" in capsys.readouterr().err, "told at once"
    if suffix == "parquet":
        assert pyarrow.parquet.read_table(output).column_names[-2:] == ["neg_text", "neg_image_path"]


def test_vectors_of_two_models_are_refused(tmp_path, tool, capsys):
    """Claim: queries and targets of two checkpoints, or of two states of one folder, give no negatives."""
    one = {"model": "/run/checkpoint", "model_files": [["a", 1, 5]], "instruction": "find: "}
    queries = embed(tmp_path / "q", angles(0, 60), **one)
    for name, change in (("model", "/other"), ("model_files", [["a", 1, 6]])):
        targets = embed(tmp_path / name, angles(0, 60), **one | {name: change})
        arguments = ["--pairs", "none.jsonl", "--queries", queries, "--targets", targets]
        arguments += ["--output", tmp_path / "mined.jsonl"]
        assert tool.main(list(map(str, arguments))) == 2
        assert f"were embedded with another {name}: embed both with one model" in capsys.readouterr().err
    check_same_model(queries, embed(tmp_path / "t", angles(0, 60), **one | {"instruction": "", "corpus": "t"}))


def test_vectors_of_other_rows_are_refused(tmp_path, tool, capsys):
    """Claim: sides that are exchanged, and rows in another order or number, are told by what the shards were made of;
    shards that do not say it pass."""
    rows = [{"qry": f"q{i}", "qry_image_path": "", "pos_text": f"t{i}", "pos_image_path": ""} for i in range(4)]
    write_pairs_file(tmp_path / "pairs.jsonl", rows)
    vectors = angles(0, 40, 80, 120)
    queries = embed(tmp_path / "q", vectors, ["q0", "q1", "q2", "q3"])
    targets = embed(tmp_path / "t", vectors, ["t0", "t1", "t2", "t3"])
    shuffled = embed(tmp_path / "s", vectors, ["t0", "t1", "t3", "t2"])
    short = embed(tmp_path / "c", vectors[:3], ["t0", "t1", "t2"])

    def mined(queries: Path, targets: Path) -> int:
        arguments = ["--pairs", tmp_path / "pairs.jsonl", "--queries", queries, "--targets", targets]
        return tool.main([*map(str, arguments), "--output", str(tmp_path / "mined.jsonl"), "--overwrite"])

    for given, message in (
        ((targets, queries), "was not made from the queries of .*rows 0 to 1"),
        ((queries, shuffled), "was not made from the targets of .*rows 2 to 3"),
        ((queries, short), "has vectors of 3 rows for 4 targets"),
    ):
        assert mined(*given) == 2 and re.search(message, capsys.readouterr().err)
    assert mined(queries, targets) == 0
    for file in shuffled.glob("shard-*.json"):
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "contents"}))
    assert mined(queries, shuffled) == 0


def test_vectors_on_a_disk_are_those_in_memory(tmp_path):
    """Claim: slices and rows in any order, over the borders of shards, are those of the whole array."""
    vectors = unit(np.random.default_rng(4).normal(size=(7, 3)))
    found = ShardedVectors(embed(tmp_path / "v", vectors))
    assert found.shape == (7, 3) and len(found) == 7
    slices = slice(1, 6), slice(6, 20), slice(0, 0), slice(5, 1, -2)
    for rows in (*slices, np.array([5, 0, 0, 6, 1, 4]), np.array([], dtype=int)):
        assert (found[rows] == vectors[rows]).all() and found[rows].dtype == np.float32


def test_damaged_vectors_are_refused(tmp_path):
    """Claim: a lost or changed shard, or a folder of something else, gives no negatives."""
    folder = embed(tmp_path / "v", angles(0, 1, 2))
    assert read_shards(folder) == pytest.approx(angles(0, 1, 2))
    file = folder / "embeddings-00001-of-00002.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="1 of 2 shards are missing or damaged"):
        read_shards(folder)
    with pytest.raises(ValueError, match="no readable manifest.json"):
        read_shards(tmp_path)
    with pytest.raises(ValueError, match="1 of them not finite"):
        read_shards(embed(tmp_path / "n", np.array([[np.nan, 0], [0, 1]], dtype=np.float32)))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_pairs_come_back_as_they_were_written(tmp_path, suffix):
    """Claim: no end of line inside a text ends its row, and a column that the first row lacks is kept."""
    text = "one\u2028two\x85three\x0b"
    first = {"qry": text, "qry_image_path": "", "pos_text": "a", "pos_image_path": ""}
    rows = [first, first | {"source": "mine"}]
    write_pairs_file(tmp_path / f"pairs.{suffix}", rows)
    found = read_pairs_file(tmp_path / f"pairs.{suffix}")
    assert [{name: value for name, value in row.items() if value is not None} for row in found] == rows


def test_malformed_pairs_are_refused(tmp_path):
    """Claim: files that are cut, empty, of another kind or without a column are named with their row."""
    for name, content, message in (
        ("a.jsonl", '{"qry": "a"', "cannot be read"),
        ("b.jsonl", "", "no rows"),
        ("c.jsonl", '{"qry": "a", "pos_text": 3}\n', "row 0: needed text"),
        ("d.txt", "", "neither"),
        ("e.parquet", "PAR1", "cannot be read"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_pairs_file(tmp_path / name)
