"""The mini benchmark from its packages, which are downloaded: ``MINI_DOWNLOADS`` may name a folder that has them."""

import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet
import pytest

from megatron_cocoa.data.concepts import base_concept
from megatron_cocoa.data.mini.build import build
from megatron_cocoa.data.toy import prepare_toy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mini")
    downloads = os.environ.get("MINI_DOWNLOADS", str(folder / "downloads"))
    for name in ("one", "two"):
        build(folder / name, downloads=downloads)
    return folder


def rows(built: Path, task: str) -> list[dict]:
    return pyarrow.parquet.read_table(built / "one" / "eval" / task).to_pylist()


def test_it_is_deterministic(built):
    """Claim: two builds from the same archives are the same bytes."""

    def content(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert content(built / "one") == content(built / "two")


def test_it_covers_what_it_should(built):
    """Claim: at least eight tasks over the four meta-tasks, two or more of them never trained on."""
    tasks = json.loads((built / "one" / "manifest.json").read_text())["tasks"]
    assert len(tasks) >= 8 and len({t["meta_task"] for t in tasks.values()}) == 4
    out = [name for name, t in tasks.items() if t["split"] == "ood"]
    assert len(out) >= 2 and all(not (built / "one" / "train" / name).exists() for name in out)


def test_the_question_alone_does_not_answer(built):
    """Claim: the best that any blind model could do, knowing all answers, is low: each text's most frequent answer.

    Half of the open questions ask for one of three shapes, half for one of eight colours: a bit above (1/3 + 1/8) / 2.
    """
    for task, most in (("EasyVQA_open", 0.32), ("EasyVQA_yesno", 0.5)):
        answers = defaultdict(Counter)
        for row in rows(built, task):
            answers[row["qry_text"]][row["tgt_text"][0]] += 1
        best = sum(max(counts.values()) for counts in answers.values())
        assert best / sum(c.total() for c in answers.values()) <= most, task
    asked = [row["qry_text"].split("the picture ")[1] for row in rows(built, "SpriteRelation")]
    relations = Counter(words.rsplit(" the ", 1)[0] for words in asked)
    assert len(relations) == 4 and min(relations.values()) > len(asked) / 8, relations


def test_nothing_of_the_quick_start_is_scored(built, tmp_path):
    """Claim: no concept that the quick start trains on names a held-out emoji here."""
    pairs = prepare_toy(tmp_path / "toy").pairs
    trained = {base_concept(json.loads(line)["caption"].split(",")[0]) for line in (pairs / "warmup.jsonl").open()}
    held = {json.loads(line)["concept"] for line in (built / "one" / "eval_heldout.jsonl").open()}
    assert len(held) > 100 and not held & trained
