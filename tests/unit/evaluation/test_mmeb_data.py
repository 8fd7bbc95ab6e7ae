"""MMEB-eval files: what is read, and what stops an evaluation."""

import shutil

import pyarrow
import pyarrow.parquet
import pytest

from megatron_cocoa.data.row_parsing import checked_content
from megatron_cocoa.data.rows import Content
from megatron_cocoa.evaluation.mmeb_data import EvalItem, picture_bytes, picture_file, read_task, task_files
from megatron_cocoa.evaluation.mmeb_tasks import META_TASKS, MMEB_V1, Task, read_benchmark
from tests.unit.mmeb_folders import write_benchmark, write_pictures, write_task

TASK = Task("colours", "classification", "ind")


def test_the_published_table():
    """Claim: MMEB-V1 has 36 tasks, 10 + 10 + 12 + 4 by meta-task, 20 in and 16 out of distribution (its paper)."""
    by = [sum(t.meta_task == meta for t in MMEB_V1.tasks) for meta in META_TASKS]
    assert META_TASKS == ("classification", "vqa", "retrieval", "grounding") and by == [10, 10, 12, 4]
    assert len({t.name for t in MMEB_V1.tasks}) == 36
    assert [sum(t.split == split for t in MMEB_V1.tasks) for split in ("ind", "ood")] == [20, 16]
    with pytest.raises(ValueError, match="no task ImageNet_1K; did you mean ImageNet-1K"):
        MMEB_V1.select(["ImageNet_1K"])
    assert [task.name for task in MMEB_V1.select(["GQA", "N24News"])] == ["N24News", "GQA"]


def test_distinct_things_are_listed_once(tmp_path):
    """Claim: equal (text, path) pairs are one thing across queries and candidates; the right one stays first."""
    rows = [
        (("<|image_1|>\nwhich?", "a.png"), [("red", ""), ("blue", "")]),
        (("<|image_1|>\nwhich?", "b.png"), [("blue", ""), ("red", ""), ("red", "")]),
        (("red", ""), [("<|image_1|>", "a.png"), ("<|image_1|>", "b.png")]),
    ]
    write_task(tmp_path, "colours", rows)
    found = read_task(tmp_path, TASK)
    assert len(found.items) == 6
    assert [found.items[i] for i in found.queries] == [query for query, _ in rows]
    assert [[found.items[i] for i in offered] for offered in found.candidates] == [offered for _, offered in rows]


@pytest.mark.parametrize("place", ["colours/test-00000-of-00001.parquet", "colours/test.parquet", "colours.parquet"])
def test_layouts_that_are_read(tmp_path, place):
    """Claim: MMEB-eval's layout and the usual others are found."""
    file = write_task(tmp_path / "made", "colours", [(("a", ""), [("b", "")])])
    (tmp_path / "data" / place).parent.mkdir(parents=True)
    shutil.copy(file, tmp_path / "data" / place)
    assert len(read_task(tmp_path / "data", TASK).queries) == 1


def test_shards_are_joined_and_a_lost_one_is_missed(tmp_path):
    """Claim: all shards count, in order; fewer than their names announce are refused."""
    for i in range(2):
        write_task(tmp_path, "colours", [((f"q{i}", ""), [("b", "")])], file=f"test-0000{i}-of-00002.parquet")
    found = read_task(tmp_path, TASK)
    assert [found.items[i].text for i in found.queries] == ["q0", "q1"]
    (tmp_path / "colours" / "test-00000-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="has 1 of 2 shards"):
        task_files(tmp_path, "colours")


def test_placeholders_and_pictures_are_made_to_agree():
    """Claim: the picture goes where it is marked, else first; a placeholder without picture goes; the rest stays.

    So line ends stay, too: WebQA's queries have a mark and no picture, and end in one like the other prompts of MMEB.
    """
    assert EvalItem("a <|image_1|> b\n", "x.png").content() == Content("a <|image_1|> b\n", "x.png")
    assert EvalItem("what?\n", "x.png").content() == Content("<|image_1|>what?\n", "x.png")
    assert EvalItem("<|image_1|>\nfind it\n", "").content() == Content("\nfind it\n")
    assert EvalItem("<|image_2|>find it", "").content() == checked_content("<|image_2|>find it", "")
    assert EvalItem("kept \n", "").content() == Content("kept \n")
    assert EvalItem("<|image_pad|>", "").content() == Content("<|image_pad|>"), "a control token in a text is text"
    assert EvalItem("<|image_1|> what?", "x.png").without_picture() == EvalItem("what?", "")
    assert EvalItem("<|image_1|> what?", "x.png").without_text() == EvalItem("<|image_1|>", "x.png")
    assert EvalItem("what?", "").without_picture() is None and EvalItem("<|image_1|>\n", "x.png").without_text() is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((("a", ""), []), "row 0: tgt_text has 0 entries"),
        ((("", ""), [("b", "")]), r"row 0: \('', ''\) cannot be embedded: it has neither"),
        ((("<|image_1|>", ""), [("b", "")]), "neither text nor picture"),
        ((("<|image_1|> <|image_1|>", "x.png"), [("b", "")]), r"has the marks <\|image_1\|>, <\|image_1\|> for one"),
        ((("<|image_2|> what?", "x.png"), [("b", "")]), r"has the marks <\|image_2\|> for one picture: needed"),
    ],
)
def test_malformed_rows_stop_the_evaluation(tmp_path, row, message):
    """Claim: a row that cannot be scored is named; none is left out."""
    write_task(tmp_path, "colours", [row])
    with pytest.raises(ValueError, match=message):
        read_task(tmp_path, TASK)


def test_malformed_files_stop_the_evaluation(tmp_path):
    """Claim: lists of unequal length, missing columns, wrong types, cut files and absent tasks are told."""
    file = tmp_path / "colours" / "test.parquet"
    file.parent.mkdir()
    good = {"qry_text": ["a"], "qry_img_path": [""], "tgt_text": [["b", "c"]], "tgt_img_path": [[""]]}
    for columns, message in (
        (good, "tgt_text has 2 entries, tgt_img_path 1"),
        ({k: v for k, v in good.items() if k != "tgt_text"}, "no column tgt_text"),
        (good | {"tgt_text": ["b"]}, "tgt_text is str, needed a list"),
        (good | {"qry_text": [3]}, "qry_text is a int"),
        ({k: pyarrow.array([], type=pyarrow.string()) for k in good}, "has no rows"),
    ):
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        with pytest.raises(ValueError, match=message):
            read_task(tmp_path, TASK)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not readable parquet"):
        read_task(tmp_path, TASK)
    with pytest.raises(ValueError, match="has no other/test-"):
        task_files(tmp_path, "other")


def test_pictures_stay_below_their_root(tmp_path):
    """Claim: absolute paths, .. and links that leave the root are refused; missing ones are listed."""
    write_pictures(tmp_path / "root", 1)
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "secret.png")
    for path in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        with pytest.raises(ValueError, match="leaves the image root"):
            picture_file(tmp_path / "root", path)
    items = [EvalItem("", "images/0.png"), EvalItem("", "images/9.png"), EvalItem("a", "")]
    (tmp_path / "root" / "folder.png").mkdir()
    size = (tmp_path / "root" / "images" / "0.png").stat().st_size
    found = picture_bytes([*items, EvalItem("", "folder.png")], tmp_path / "root")
    assert found == {"images/0.png": size, "images/9.png": None, "folder.png": None}
    with pytest.raises(ValueError, match="leaves the image root"):
        picture_bytes([EvalItem("", "../secret.png")], tmp_path / "root")


def test_a_folder_brings_its_own_table(tmp_path):
    """Claim: benchmark.json takes MMEB-V1's place; a broken one is refused."""
    assert read_benchmark(tmp_path) is MMEB_V1
    write_benchmark(tmp_path, {"colours": ("classification", "ood")})
    assert read_benchmark(tmp_path).tasks == (Task("colours", "classification", "ood"),)
    write_benchmark(tmp_path, {"colours": ("colouring", "ood")})
    with pytest.raises(ValueError, match="colouring"):
        read_benchmark(tmp_path)
    (tmp_path / "benchmark.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="not a table of tasks"):
        read_benchmark(tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        read_benchmark(tmp_path / "nowhere")
