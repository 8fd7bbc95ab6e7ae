"""Rows are read as the formats say; what cannot serve is counted under a reason, never dropped in silence."""

from __future__ import annotations

import pytest

from megatron_cocoa.data.row_parsing import checked_negatives
from megatron_cocoa.data.rows import Content, PairRow
from megatron_cocoa.data.sources import read_captions
from tests.unit.data.rows import pair, read_bridge_pairs, read_pairs, write_jsonl

GOOD = [{"id": f"g{i}", "image_path": "a.png", "caption": "a cat"} for i in range(97)]


def test_malformed_rows_are_counted_by_reason(tmp_path):
    bad = [{"id": "b1", "image_path": "", "caption": "x"}, "{broken", {"id": "b3", "image_path": "a.png"}]
    found = read_captions(write_jsonl(tmp_path / "w.jsonl", GOOD + bad))
    assert len(found.rows) == 97
    assert found.dropped == {"image_path_empty": 1, "not_json": 1, "caption_missing": 1}


def test_too_many_malformed_rows_stop_the_run(tmp_path):
    path = write_jsonl(tmp_path / "w.jsonl", GOOD[:10] + [{"id": "x", "image_path": 3, "caption": "a"}, "[1]"])
    with pytest.raises(ValueError, match=r"2 of 12 rows are malformed .*image_path_not_text.*w:11.*at most 5%"):
        read_captions(path)


def test_missing_and_empty_files_say_so(tmp_path):
    with pytest.raises(ValueError, match="nowhere.jsonl cannot be read .*: name it, or the folder that has it"):
        read_captions(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="0 of 0 rows"):
        read_captions(write_jsonl(tmp_path / "empty.jsonl", []))


def test_a_file_in_another_encoding_says_so(tmp_path):
    (tmp_path / "w.jsonl").write_bytes('{"id": "a", "image_path": "a.png", "caption": "café"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="w.jsonl is not UTF-8"):
        read_captions(tmp_path / "w.jsonl")


def test_rows_without_an_id_are_named_by_line(tmp_path):
    rows = [{k: v for k, v in GOOD[0].items() if k != "id"}] * 2
    found = read_captions(write_jsonl(tmp_path / "w.jsonl", rows))
    assert [row.row_id for row in found.rows] == ["w:1", "w:2"]


def test_a_left_over_placeholder_goes_and_a_missing_one_is_an_error(tmp_path):
    good = [pair(f"p{i}", qry="<|image_1|>\nwhat?", pos_text="cat") for i in range(40)]
    bad = pair("bad", qry="no place", qry_image_path="a.png", pos_text="cat")
    found = read_pairs(write_jsonl(tmp_path / "c.jsonl", [*good, bad]))
    assert found.rows[0] == PairRow("p0", Content("\nwhat?"), Content("cat"))
    assert found.dropped == {"image_without_placeholder": 1}


def test_bridge_rules_flip_text_to_image_and_drop_what_has_no_text_target(tmp_path):
    rows = [
        pair("i2t", qry="<|image_1|>\nWhat is it?", qry_image_path="a.png", pos_text="<|image_1|> a cat"),
        pair("t2i", qry="a dog", pos_text="<|image_1|>\nRepresent the given image.", pos_image_path="b.png"),
        pair("i2i", qry="<|image_1|>", qry_image_path="a.png", pos_text="<|image_1|>", pos_image_path="b.png"),
        pair("constant", qry="<|image_1|>", qry_image_path="a.png", pos_text="Represent the given image."),
        pair("text", qry="question", pos_text="answer"),
    ]
    found = read_bridge_pairs(write_jsonl(tmp_path / "b.jsonl", rows))
    assert found.rows == [
        PairRow("i2t", Content("<|image_1|>\nWhat is it?", "a.png"), Content("a cat")),
        PairRow("t2i", Content("<|image_1|>\nRepresent the given image.", "b.png"), Content("a dog")),
        PairRow("text", Content("question"), Content("answer")),
    ]
    assert found.dropped == {"image_to_image": 1, "constant_target": 1} and found.flipped == 1


def test_a_bridge_file_without_text_targets_is_refused(tmp_path):
    row = pair("i2i", qry="<|image_1|>", qry_image_path="a.png", pos_text="<|image_1|>", pos_image_path="b.png")
    with pytest.raises(ValueError, match="no row whose target carries text"):
        read_bridge_pairs(write_jsonl(tmp_path / "b.jsonl", [row]))


@pytest.mark.parametrize(
    ("texts", "paths", "wanted"),
    [
        (None, None, ()),
        ("", "", ()),
        ([], None, ()),
        ("a dog", "", (Content("a dog"),)),
        ("a dog", None, (Content("a dog"),)),
        ("<|image_1|>", "d.png", (Content("<|image_1|>", "d.png"),)),
        (["a dog", "<|image_1|> a left-over"], None, (Content("a dog"), Content(" a left-over"))),
        (["a dog", ""], ["", ""], (Content("a dog"),)),
        (["a dog", "<|image_1|>"], ["", ""], (Content("a dog"),)),
        (["a dog", "<|image_1|>"], ["", "d.png"], (Content("a dog"), Content("<|image_1|>", "d.png"))),
    ],
)
def test_hard_negatives_are_strings_or_lists(texts, paths, wanted):
    """Claim: both forms of MMEB-train's columns are read; an entry without text and picture is no negative."""
    assert checked_negatives(texts, paths) == wanted


def test_malformed_negatives_drop_the_row_under_a_reason_and_only_where_they_are_asked_for(tmp_path):
    good = [pair(f"p{i}", qry="what?", pos_text="cat", neg_text="dog") for i in range(80)]
    bad = [
        pair("lengths", qry="what?", pos_text="cat", neg_text=["dog", "cow"], neg_image_path=["", "", ""]),
        pair("place", qry="what?", pos_text="cat", neg_text="no place", neg_image_path="d.png"),
        pair("type", qry="what?", pos_text="cat", neg_text=[7]),
    ]
    path = write_jsonl(tmp_path / "c.jsonl", [*good, *bad])
    found = read_pairs(path, with_negatives=True)
    assert found.dropped == {
        "neg_columns_differ_in_length": 1,
        "neg_image_without_placeholder": 1,
        "neg_text_not_text": 1,
    }
    assert all(row.negatives == (Content("dog"),) for row in found.rows)
    without = read_pairs(path)
    assert without.dropped == {} and len(without.rows) == 83 and not any(row.negatives for row in without.rows)


def test_the_source_of_a_row_is_read(tmp_path):
    rows = [pair("a", qry="what?", pos_text="cat", source="VQA"), pair("b", qry="what?", pos_text="cat")]
    assert [row.source for row in read_pairs(write_jsonl(tmp_path / "c.jsonl", rows)).rows] == ["VQA", ""]
