"""The evaluation with an embedder of known vectors: scores, files, resuming, and the summary."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megatron_cocoa.evaluation import mmeb_data
from megatron_cocoa.evaluation.mmeb_data import EvalItem
from megatron_cocoa.evaluation.mmeb_encode import Encoded
from megatron_cocoa.evaluation.mmeb_files import Identity, folder_sha256
from megatron_cocoa.evaluation.mmeb_page import render_page
from megatron_cocoa.evaluation.mmeb_run import VectorStore, evaluate
from megatron_cocoa.evaluation.mmeb_summary import render_summary, summarize
from megatron_cocoa.evaluation.mmeb_tasks import Benchmark, Task
from megatron_cocoa.evaluation.report_data import StageCurve
from tests.unit.mmeb_folders import write_pictures, write_task

TABLE = Benchmark("tiny", (Task("colours", "classification", "ind"), Task("places", "grounding", "ood")))
VECTORS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "also red": (1, 0, 0)}


class KnownEmbedder:
    """Texts by ``VECTORS``, pictures by their name's colour; remembers what it was asked for."""

    def __init__(self, constant: bool = False):
        self.asked: list[EvalItem] = []
        self.constant = constant
        self.too_long: tuple[str, ...] = ()

    def __call__(self, items):
        self.asked += items
        vectors = np.array([self.vector(item) for item in items], dtype=np.float32)
        return Encoded(vectors, np.array([item.text in self.too_long for item in items]))

    def vector(self, item):
        if self.constant:
            return (1, 1, 1)
        if item.image_path:
            # The pictures 0, 1, 2 are red, green, blue; a question in the text leans towards green.
            found = np.eye(3)[int(item.image_path.split("/")[-1][0])]
            return found + (0, 0.4, 0) if "green" in item.text else found
        return VECTORS.get(item.text, (0.2, 1, 0.3))


@pytest.fixture
def folder(tmp_path):
    paths = write_pictures(tmp_path, 3)
    question = "<|image_1|> is it green?"
    names = ["red", "green", "blue"]
    rows = [((question, paths[i]), [(names[(i + j) % 3], "") for j in range(3)]) for i in range(3)]
    # The same picture asked again, now with a right answer that ties, and with one that is wrong.
    rows += [
        ((question, paths[0]), [("red", ""), ("also red", "")]),
        ((question, paths[0]), [("green", ""), ("red", "")]),
    ]
    write_task(tmp_path / "eval", "colours", rows)
    places = [((name, ""), [("", paths[i]), ("", paths[0])]) for i, name in enumerate(names)]
    write_task(tmp_path / "eval", "places", places)
    return tmp_path


def run(folder, encode, *, output="scores", tasks=TABLE.tasks, settings=None, said=None, benchmark=TABLE, **more):
    identity = Identity(settings or {"image_size": "native"}, {"name": "m", "sha256": "1"}, benchmark.to_json())
    lines = [] if said is None else said
    evaluate(
        tasks,
        data_path=folder / "eval",
        image_root=folder,
        output=folder / output,
        encode=encode,
        identity=identity,
        versions={},
        say=lines.append,
        **more,
    )
    return folder / output


def read(output, task):
    return json.loads((output / f"{task}_score.json").read_text())


def test_scores_and_predictions_are_those_worked_out_by_hand(folder):
    """Claim: 4 of 5 are right by argmax, one of them by a tie; blind baselines see what they should.

    Without the picture every query is one text, nearest to green: right in the row of green and the last one, and at
    random where red and also red tie: 2.5 of 5. Without the text pictures keep their colours: 3.5 of 5 likewise.
    """
    output = run(folder, KnownEmbedder(), with_baselines=True)
    found = read(output, "colours")
    assert (found["num_correct"], found["num_pred"], found["acc"]) == (4, 5, 0.8)
    assert found["num_ties"] == 1
    assert found["acc_ties_as_wrong"] == 0.6 and found["acc_expected"] == pytest.approx(0.7)
    assert found["baselines"] == {
        "chance": pytest.approx((3 * 1 / 3 + 2 * 1 / 2) / 5),
        "majority": 0.4,
        "query_text_only": 0.5,
        "query_image_only": 0.7,
    }
    lines = (output / "colours_pred.txt").read_text().splitlines()
    assert lines == ["('red', '')", "('green', '')", "('blue', '')", "('red', '')", "('red', '')"]
    # "places" asks by text alone, so there is nothing to take away. Its first row holds one thing twice.
    places = read(output, "places")
    assert places["acc"] == 1.0 and places["num_ties"] == 0
    assert places["baselines"]["query_text_only"] is None and places["baselines"]["query_image_only"] is None


def test_each_distinct_thing_is_embedded_once(folder):
    """Claim: over all tasks and baselines nothing is embedded twice."""
    encode = KnownEmbedder()
    run(folder, encode, with_baselines=True)
    assert len(encode.asked) == len(set(encode.asked)) > 10


def test_a_constant_embedder_is_told(folder):
    """Claim: equal vectors cannot pass for a perfect model: file, summary, table and status all say so."""
    said = []
    output = run(folder, KnownEmbedder(constant=True), said=said)
    found = read(output, "colours")
    assert found["acc"] == 1.0 and found["all_tied"] and found["num_ties"] == 5 and found["acc_ties_as_wrong"] == 0.0
    summary = summarize(output)
    assert any("WARNING" in line and "ALL 5 queries tie" in line for line in said)
    assert "ALL 5 queries tie" in render_summary(summary) and summary.has_meaningless
    assert summary.to_json()["ties_as_wrong"]["classification"] == 0.0
    assert "ALL 5 queries tie" in render_page(summary, output=output, image_root=folder)


def test_it_goes_on_where_it_was_stopped(folder):
    """Claim: scored tasks are kept untouched; half-written or lost ones are made again."""
    output = run(folder, KnownEmbedder(), tasks=TABLE.tasks[:1])
    before = (output / "colours_score.json").stat().st_mtime_ns
    (output / ".places_score.json.incomplete").write_text('{"acc": ')
    encode, said = KnownEmbedder(), []
    run(folder, encode, said=said)
    assert "colours: kept" in said and (output / "colours_score.json").stat().st_mtime_ns == before
    assert all("?" not in item.text for item in encode.asked) and read(output, "places")["acc"] == 1.0
    assert not list(output.glob(".*"))


def test_cut_texts_are_those_of_the_task(folder):
    """Claim: ``num_cut`` counts a task's own things, whether this task embedded them, an earlier one, or a blind form
    of it has them, too."""
    encode = KnownEmbedder()
    encode.too_long = ("green", "<|image_1|> is it green?", "is it green?")
    whole = run(folder, encode, with_baselines=True)
    parts = run(folder, encode, output="parts", tasks=TABLE.tasks[1:])
    assert encode.asked.count(EvalItem("green", "")) == 2, "once for both tasks, and once more for the second alone"
    # In the first task green and the question about each of three pictures.
    assert read(whole, "colours")["num_cut"] == 4
    assert read(whole, "places")["num_cut"] == read(parts, "places")["num_cut"] == 1


def test_no_more_vectors_are_kept_than_are_needed():
    """Claim: a thing that a later task has, too, does not keep its whole task's vectors in memory."""
    items = [EvalItem(name, "") for name in VECTORS]
    store = VectorStore(KnownEmbedder(), Counter(items + items[:1]))
    store.vectors(items)
    ((kept, _),) = store._kept.values()
    assert kept.base is None
    assert store.vectors(items[:1]).vectors.tolist() == [[1, 0, 0]] and not store._kept


def test_other_settings_are_refused_by_name(folder):
    """Claim: a score of other settings, or other data, is neither kept nor lost without being asked for."""
    output = run(folder, KnownEmbedder())
    with pytest.raises(ValueError, match=r"settings.image_size \(was 'native', is now 672\).*--overwrite"):
        run(folder, KnownEmbedder(), settings={"image_size": 672})
    assert read(output, "colours")["settings"] == {"image_size": "native"}
    run(folder, KnownEmbedder(), settings={"image_size": 672}, overwrite=True)
    assert read(output, "colours")["settings"] == {"image_size": 672}
    write_task(folder / "eval", "places", [(("red", ""), [("", "images/0.png")])])
    with pytest.raises(ValueError, match="data.sha256"):
        run(folder, KnownEmbedder(), settings={"image_size": 672})
    (output / "colours_score.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        run(folder, KnownEmbedder(), settings={"image_size": 672}, tasks=TABLE.tasks[:1])


def test_a_file_in_the_place_of_the_folder_is_told_before_anything_is_scored(folder):
    """Claim: a mistyped output costs no hours of embedding."""
    (folder / "scores").write_text("")
    encode = KnownEmbedder()
    with pytest.raises(ValueError, match="scores is a file: name a folder"):
        run(folder, encode)
    assert not encode.asked


def test_scores_that_make_no_table_are_refused_before_they_are_made(folder):
    """Claim: a task is not scored into a folder where another one has a score of other settings, asked for or not."""
    run(folder, KnownEmbedder(), tasks=TABLE.tasks[:1])
    encode = KnownEmbedder()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"colours_score.json, a task that is not scored now, .*is now 672"):
            run(folder, encode, tasks=TABLE.tasks[1:], settings={"image_size": 672}, overwrite=overwrite)
    assert not encode.asked
    run(folder, encode, tasks=TABLE.tasks[1:])
    run(folder, encode, settings={"image_size": 672}, overwrite=True)
    other = replace(TABLE, name="another")
    with pytest.raises(ValueError, match="benchmark.name .was 'tiny', is now 'another'"):
        run(folder, encode, tasks=TABLE.tasks[1:], settings={"image_size": 672}, benchmark=other, overwrite=True)


def test_the_examples_of_a_task_are_told_by_their_right_answer(folder):
    """Claim: of each example the right candidate, its rank and the nearest ones stand in the evidence; a query that is
    answered is no worst one."""
    found = json.loads((run(folder, KnownEmbedder()) / "colours_evidence.json").read_text())
    assert found["worst"] == [
        {
            "query": ["<|image_1|> is it green?", "images/0.png"],
            "gold": ["green", ""],
            "rank": 2,
            "num_candidates": 2,
            # Against (1, 0.4, 0): cosines are 1 and 0.4 over its length.
            "candidates": [
                {"item": ["red", ""], "cosine": 0.9285, "right": False},
                {"item": ["green", ""], "cosine": 0.3714, "right": True},
            ],
        },
    ]  # fmt: skip
    answered = [example for kind in ("hits", "misses") for example in found[kind]]
    assert [example["gold"][0] for example in answered if example["rank"] == 1] == ["red", "green", "blue"]


def test_what_moves_scores_by_rounding_is_recorded(folder):
    """Claim: the batch size, which moves vectors under bf16, stands in the score file, and no other one is refused."""
    output = run(folder, KnownEmbedder(), computation={"batch_size": 4})
    run(folder, KnownEmbedder(), computation={"batch_size": 8})
    found = read(output, "colours")["run"]
    assert found["batch_size"] == 4 and found["ranks"] == 1


def test_pictures_of_another_size_are_other_data(folder):
    """Claim: a score is not kept where a task's pictures are other files than it was made with; texts alone are."""
    write_task(folder / "eval", "colours", [(("red", ""), [("red", ""), ("blue", "")])])
    output = run(folder, KnownEmbedder())
    Image.new("RGB", (300, 200), "red").save(folder / "images" / "1.png")
    said = []
    run(folder, KnownEmbedder(), tasks=TABLE.tasks[:1], said=said)
    assert said == ["colours: kept"]
    with pytest.raises(ValueError, match=r"places_score.json was made with another data.pictures_sha256"):
        run(folder, KnownEmbedder())
    before = read(output, "places")["data"]
    run(folder, KnownEmbedder(), overwrite=True)
    after = read(output, "places")["data"]
    assert after["sha256"] == before["sha256"] and after["pictures_sha256"] != before["pictures_sha256"]


def test_each_picture_is_looked_for_once(folder, monkeypatch):
    """Claim: whether pictures are there and how large they are is asked once each, whichever tasks have them."""
    asked = []
    find = mmeb_data.picture_file
    monkeypatch.setattr(mmeb_data, "picture_file", lambda root, path: asked.append(path) or find(root, path))
    run(folder, KnownEmbedder())
    assert sorted(asked) == [f"images/{i}.png" for i in range(3)]


def test_missing_pictures_and_broken_vectors_stop_it(folder):
    """Claim: nothing is scored without its pictures, or with vectors that are not finite; finished tasks stay."""
    encode = KnownEmbedder()
    (folder / "images" / "2.png").unlink()
    with pytest.raises(ValueError, match="1 pictures are not below .*images/2.png"):
        run(folder, encode)
    assert not encode.asked
    write_pictures(folder, 3)

    def broken(items):
        rows = KnownEmbedder()(items).vectors
        rows[[item.image_path == "images/1.png" and not item.text for item in items]] = np.nan
        return Encoded(rows, np.zeros(len(rows), dtype=bool))

    with pytest.raises(ValueError, match=r"task places: .*not finite.*\('', 'images/1.png'\)"):
        run(folder, broken)
    assert [file.name for file in (folder / "scores").glob("*_score.json")] == ["colours_score.json"]


def test_a_summary_never_averages_over_fewer_tasks(folder):
    """Claim: with a task missing every mean that needs it is null, and the partial means say over how many."""
    output = run(folder, KnownEmbedder(), tasks=TABLE.tasks[:1])
    found = summarize(output).to_json()
    assert found["missing"] == ["places"] and found["tasks"] == {"colours": 0.8, "places": None}
    assert found["overall"] is found["ood"] is found["grounding"] is None
    assert found["ind"] == found["classification"] == 0.8 and found["vqa"] is found["retrieval"] is None
    assert found["partial"]["overall"] == {"acc": 0.8, "num_tasks": 1, "of": 2}
    assert "missing (1): places" in render_summary(summarize(output))
    run(folder, KnownEmbedder())
    found = summarize(output).to_json()
    assert found["overall"] == pytest.approx(0.9) and found["ood"] == 1.0 and found["missing"] == []
    assert "partial" not in found


def test_published_score_files_are_summarised(tmp_path):
    """Claim: files with the published keys alone are MMEB-V1's, and damaged or foreign ones are refused."""
    for name, correct in (("ImageNet-1K", 3), ("MSCOCO", 1)):
        content = {"acc": correct / 4, "num_correct": correct, "num_pred": 4}
        (tmp_path / f"{name}_score.json").write_text(json.dumps(content))
    found = summarize(tmp_path).to_json()
    assert found["benchmark"] == "MMEB-V1" and len(found["missing"]) == 34 and found["overall"] is None
    assert found["partial"]["overall"]["acc"] == 0.5 and found["tasks"]["MSCOCO"] == 0.25
    (tmp_path / "MSCOCO_score.json").write_text('{"acc": 0.5, "num_correct": 1, "num_pred": 4}')
    with pytest.raises(ValueError, match="damaged"):
        summarize(tmp_path)
    (tmp_path / "MSCOCO_score.json").rename(tmp_path / "Elsewhere_score.json")
    (tmp_path / "Elsewhere_score.json").write_text('{"acc": 0.25, "num_correct": 1, "num_pred": 4}')
    with pytest.raises(ValueError, match="no task Elsewhere"):
        summarize(tmp_path)
    with pytest.raises(ValueError, match="has no"):
        summarize(tmp_path / "empty")


def test_scores_of_two_models_make_no_table(folder):
    """Claim: files of other settings or models in one folder are refused, with what differs."""
    output = run(folder, KnownEmbedder(), tasks=TABLE.tasks[:1])
    other = run(folder, KnownEmbedder(), output="other", tasks=TABLE.tasks[1:], settings={"image_size": 448})
    (other / "places_score.json").rename(output / "places_score.json")
    with pytest.raises(ValueError, match="colours and places .*settings .*image_size: 'native' and 448"):
        summarize(output)


def test_the_page_is_whole_and_safe(folder):
    """Claim: the page has every part, draws pictures, escapes what it shows and loads nothing."""
    write_task(folder / "eval", "places", [(("<script>red", ""), [("", "images/1.png"), ("", "images/0.png")])])
    output = run(folder, KnownEmbedder(), with_baselines=True)
    html = render_page(summarize(output), output=output, image_root=folder)
    for part in ("Scores beside baselines", "Hits and misses", "Worst queries", "Embedding map", "Settings"):
        assert part in html
    assert "<script" not in html and "&lt;script&gt;red" in html and "data:image/png;base64," in html
    assert "http" not in html.replace("http-equiv", "") and html.count("<svg") >= 4
    assert html == render_page(summarize(output), output=output, image_root=folder)
    assert "--run-path named none" in html
    curves = (StageCurve("bridge", (1, 2), {"mntp": (3.0, 2.5)}, {"mntp": "nats per token"}),)
    trained = render_page(summarize(output), output=output, image_root=folder, curves=curves)
    assert "Stage bridge" in trained and trained.count("<svg") == html.count("<svg") + 1


def test_a_model_is_known_by_its_files(tmp_path):
    """Claim: the hash follows names and contents, not the place, nor what the download of a model notes beside it."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(b"1")
    assert folder_sha256(tmp_path / "a") == folder_sha256(tmp_path / "b")
    for note in (".cache/huggingface/weights.metadata", ".git/index"):
        (tmp_path / "b" / note).parent.mkdir(parents=True)
        (tmp_path / "b" / note).write_text("1700000000.0")
    assert folder_sha256(tmp_path / "a") == folder_sha256(tmp_path / "b")
    # A checkpoint of torch.distributed has a hidden file of its own.
    (tmp_path / "b" / ".metadata").write_bytes(b"1")
    assert folder_sha256(tmp_path / "a") != folder_sha256(tmp_path / "b")
    (tmp_path / "b" / ".metadata").unlink()
    (tmp_path / "b" / "weights").write_bytes(b"2")
    assert folder_sha256(tmp_path / "a") != folder_sha256(tmp_path / "b")
    with pytest.raises(ValueError, match="not a folder"):
        folder_sha256(tmp_path / "c")
