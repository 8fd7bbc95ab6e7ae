"""The mini benchmark's parts on made-up sources; the whole build is in tests/e2e, where it may download."""

import io
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from megatron_cocoa.data.mini import grounding, packages
from megatron_cocoa.data.mini.build import build
from megatron_cocoa.data.mini.emoji import Emoji, emoji_tasks
from megatron_cocoa.data.mini.leaks import check_leaks, largest_correlation
from megatron_cocoa.data.mini.other_tasks import _draw
from megatron_cocoa.data.mini.packages import Package, fetch, members
from megatron_cocoa.data.mini.rows import (
    EvalRow,
    Pair,
    PictureFolder,
    Side,
    TaskRows,
    gold_first,
    pair_record,
    write_eval,
    write_jsonl,
    write_train,
)
from tests.unit.data.rows import read_pairs

GROUPS = ("food & drink", "objects", "animals & nature")


def noise(seed: int, side: int = 72) -> Image.Image:
    """Blocks of colour, which no resizing makes alike."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST)


@pytest.fixture
def emojis(tmp_path):
    """24 held-out and 24 training emojis in each style, all different."""
    folder = PictureFolder(tmp_path)
    found = []
    for style, offset in (("noto", 0), ("fluent", 1000)):
        for i in range(48):
            image = noise(offset + i)
            path = folder.write(style, f"{i:x}", image)
            small = np.asarray(image.resize((16, 16), Image.Resampling.BOX))
            split = "heldout" if i % 2 else "train"
            name = f"thing {i}"
            found.append(Emoji(f"{i:x}", style, name, f"{name}, tag", name, GROUPS[i % 3], path, split, small))
    return found


def test_every_task_has_its_answer_first_and_trains_on_the_other_side(emojis, tmp_path, monkeypatch):
    """Claim: the right candidate is first and once in its list, and no held-out picture or caption is trained on."""
    monkeypatch.setattr(grounding, "_WINDOWS", {"heldout": 8, "train": 8})
    tasks = emoji_tasks(emojis) + grounding.grounding_tasks(emojis, PictureFolder(tmp_path), tmp_path)
    held = {e.path for e in emojis if e.split == "heldout"} | {e.caption for e in emojis if e.split == "heldout"}
    assert [t.name for t in tasks if not t.train] == ["SpriteRelation_3d"]
    for task in tasks:
        assert task.eval_rows
        for row in task.eval_rows:
            assert row.targets.count(row.targets[0]) == 1 and len(set(row.targets)) == len(row.targets)
        sides = [side for pair in task.train for side in (pair.query, pair.target)]
        assert not ({side.text for side in sides} | {side.image for side in sides}) & held
    assert emoji_tasks(emojis) == emoji_tasks(emojis), "nothing is drawn anew"


def test_relations_hold_in_the_window(emojis, tmp_path, monkeypatch):
    """Claim: walking from the named picture by the relation leads to the answer's cell, in the pixels of the window.

    Cells are found again by comparing pixels, not by what the builder thinks. Each cell is asked for equally often.
    """
    monkeypatch.setattr(grounding, "_WINDOWS", {"heldout": 8, "train": 1})
    task = grounding.grounding_tasks(emojis, PictureFolder(tmp_path), tmp_path)[0]
    by_name = {e.name: e for e in emojis if e.style == "noto"}
    size = grounding.CELL
    asked = Counter()
    for row in task.eval_rows:
        window = np.asarray(Image.open(tmp_path / row.query.image))
        cells = [window[r * size : (r + 1) * size, c * size : (c + 1) * size] for r in range(4) for c in range(4)]

        def place(path, cells=cells):
            picture = np.asarray(Image.open(tmp_path / path).resize((size, size), Image.Resampling.LANCZOS))
            return next(i for i, cell in enumerate(cells) if np.array_equal(cell, picture))

        words = row.query.text.split("Select the picture ")[1]
        relation, name = words.rstrip(".").rsplit(" the ", 1)
        start, end = divmod(place(by_name[name].path), 4), divmod(place(row.targets[0].image), 4)
        steps = {"to the right of": (0, 1), "to the left of": (0, -1), "below": (1, 0), "above": (-1, 0)}
        assert (end[0] - start[0], end[1] - start[1]) == steps[relation]
        asked[end] += 1
        assert len(row.targets) == 16 and {s.text for s in row.targets} == {row.targets[0].text}
    assert set(asked.values()) == {1} and len(asked) == 16


def test_yes_and_no_are_equally_frequent_for_each_question():
    """Claim: whoever sees the question alone is right half of the time, however skewed the source is."""
    rows = [["is it red?", "yes" if i % 5 else "no", i] for i in range(200)]
    rows += [["is it blue?", "yes" if i % 3 == 0 else "no", i] for i in range(200)]
    rows += [["what is it?", "circle", i] for i in range(9)]
    drawn = _draw(rows, "yesno", "test")
    counts = Counter((question, answer) for question, answer, _ in drawn)
    assert counts["is it red?", "yes"] == counts["is it red?", "no"] == 40
    assert counts["is it blue?", "yes"] == counts["is it blue?", "no"] == 67
    assert {answer for _, answer, _ in _draw(rows, "open", "test")} == {"circle"}


def test_planted_leaks_are_found(emojis, tmp_path):
    """Claim: a shared picture, a shared caption, a shared concept and a near-copy each make a problem of their own."""
    train = [e for e in emojis if e.split == "train"]
    held = next(e for e in emojis if e.split == "heldout")
    quick = np.stack([e.thumbnail for e in train])
    row = EvalRow(Side("", held.path), (Side("a"), Side("b")))
    nothing = (set(), set())

    def problems(trained, *, quick=quick, concepts=nothing, captions=nothing):
        task = TaskRows("t", "vqa", "ind", [row], [Pair(Side("", trained), Side("a"))])
        return check_leaks(tmp_path, [task], quick_start=quick, concepts=concepts, captions=captions).problems

    assert problems(train[0].path) == ()
    assert any("both scored and trained" in p for p in problems(held.path))
    near = np.clip(np.asarray(noise(1)).astype(int) + 6, 0, 255).astype(np.uint8)
    copy = PictureFolder(tmp_path).write("copies", "near", Image.fromarray(near))
    assert any("twin of a training picture" in p for p in problems(copy))
    assert any("twin" in p for p in problems(train[0].path, quick=held.thumbnail[None]))
    assert "concept 'x' is on both sides" in problems(train[0].path, concepts=({"x"}, {"x", "y"}))
    assert "caption 'x' is on both sides" in problems(train[0].path, captions=({"x"}, {"x"}))


def test_correlation_is_pearsons():
    """Claim: the fast comparison equals numpy's corrcoef; flat pictures are like nothing."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8), rng.integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    wanted = [max(np.corrcoef(x.ravel(), y.ravel())[0, 1] for y in b) for x in a]
    # Float32 sums of 48 products.
    assert largest_correlation(a, b) == pytest.approx(wanted, abs=1e-5)
    assert largest_correlation(np.full((1, 4, 4, 3), 9, dtype=np.uint8), b)[0] == pytest.approx(0, abs=1e-6)


def test_what_is_written_is_read_by_trainer_and_evaluator(tmp_path):
    """Claim: the training rows are the trainer's JSONL, the parquet columns MMEB's."""
    import pyarrow.parquet

    pairs = [Pair(Side("<|image_1|>\nwhat?", "images/a.png"), Side("a cat"))]
    rows = [EvalRow(pairs[0].query, gold_first(Side("a cat"), [Side("a dog"), Side("a cat")]))]
    task = TaskRows("T", "vqa", "ind", rows, pairs)
    write_eval(tmp_path, task)
    write_train(tmp_path, task)
    write_jsonl(tmp_path / "contrastive.jsonl", [pair_record("T-0", pairs[0])])
    found = read_pairs(tmp_path / "contrastive.jsonl").rows[0]
    assert (found.query.text, found.query.image_path) == ("<|image_1|>\nwhat?", "images/a.png")
    assert found.target.text == "a cat"
    table = pyarrow.parquet.read_table(tmp_path / "train" / "T" / "train-00000-of-00001.parquet").to_pylist()
    assert list(table[0]) == ["qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"]
    table = pyarrow.parquet.read_table(tmp_path / "eval" / "T" / "test-00000-of-00001.parquet").to_pylist()
    assert table[0]["tgt_text"] == ["a cat", "a dog"] and table[0]["tgt_img_path"] == ["", ""]


def archive(path, names: dict[str, bytes], links: dict[str, str] | None = None):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return path


def test_archives_reach_memory_alone(tmp_path, monkeypatch):
    """Claim: members that climb out, and links, write nothing; too large ones and cut archives are refused."""
    made = archive(tmp_path / "a.tgz", {"../../evil": b"x", "./package/a": b"1"}, {"package/b": "/etc/passwd"})
    assert dict(members(made, lambda name: True)) == {"../../evil": b"x", "package/a": b"1"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tgz"]
    monkeypatch.setattr(packages, "MAX_MEMBER_BYTES", 3)
    with pytest.raises(ValueError, match="announces 4 bytes, at most 3"):
        list(members(archive(tmp_path / "b.tgz", {"big": b"1234"}), lambda name: True))
    with zipfile.ZipFile(tmp_path / "c.whl", "w") as file:
        file.writestr("big", b"1234")
    with pytest.raises(ValueError, match="announces 4 bytes"):
        list(members(tmp_path / "c.whl", lambda name: True))
    (tmp_path / "d.tgz").write_bytes(made.read_bytes()[:40])
    with pytest.raises(ValueError, match="cannot be read"):
        list(members(tmp_path / "d.tgz", lambda name: True))


def test_only_the_known_archive_is_used(tmp_path, monkeypatch):
    """Claim: an archive with another checksum is refused and not kept; a verified one is not fetched again."""
    package = Package("npm", "@some/thing", "1.0", "0" * 64, "MIT", "x")

    def download(command, folder, package):
        (folder / "some-thing-1.0.tgz").write_bytes(b"other")

    monkeypatch.setattr(packages, "_run", download)
    with pytest.raises(ValueError, match="needed 0000"):
        fetch(package, tmp_path)
    assert not list(tmp_path.iterdir())
    digest = packages.sha256_of(archive(tmp_path / "some-thing-1.0.tgz", {}))
    known = Package("npm", "@some/thing", "1.0", digest, "MIT", "x")
    monkeypatch.setattr(packages, "_run", None)
    assert fetch(known, tmp_path) == tmp_path / "some-thing-1.0.tgz"


def test_a_failed_client_is_told(tmp_path):
    """Claim: a registry client that is missing or fails is named, with what else would do."""
    package = Package("npm", "thing", "1.0", "0" * 64, "MIT", "x")
    with pytest.raises(ValueError, match="no-such-client is needed to fetch thing"):
        packages._run(["no-such-client"], tmp_path, package)
    with pytest.raises(ValueError, match="failed with status 1.*thing-1.0.tgz"):
        packages._run(["false"], tmp_path, package)


def test_other_folders_are_left_alone(tmp_path):
    """Claim: the builder replaces nothing but an earlier benchmark, and that only when asked."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        build(tmp_path, downloads=tmp_path / "d", overwrite=True)
    target = tmp_path / "mini"
    (target / "eval").mkdir(parents=True)
    (target / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="--overwrite"):
        build(target, downloads=tmp_path / "d")
