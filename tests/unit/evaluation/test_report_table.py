"""The terminal's table: the same numbers as the report's, narrow enough to read, ties and gaps spelled out."""

from __future__ import annotations

import torch

from megatron_cocoa.evaluation.metrics import evaluate_pairs
from megatron_cocoa.evaluation.report_data import RecallRow
from megatron_cocoa.evaluation.report_table import render_table, tie_notes


def rows_for(model: str, texts: torch.Tensor, kind: str = "stage") -> list[RecallRow]:
    results = evaluate_pairs(texts, torch.eye(len(texts)), keys=range(len(texts)))
    return [RecallRow(model, "heldout", direction, result, kind) for direction, result in results.items()]


def test_numbers_stand_beside_chance():
    """Claim: each row shows recall with interval and the multiple of chance, below a row for chance."""
    table = render_table(rows_for("after contrastive", torch.eye(50)))
    assert "Held-out concepts, text to image (50 queries among 50)" in table
    assert "Held-out concepts, image to text (50 queries among 50)" in table
    lines = table.splitlines()
    chance, model = lines[2].split(), lines[3].split()
    assert chance == ["chance", "2.0", "10.0", "20.0", "1.0"]
    # Wilson's interval for 50 of 50 starts at 92.9%.
    assert " ".join(model) == "after contrastive 100.0 [ 92.9,100.0] 100.0 [ 92.9,100.0] 100.0 [ 92.9,100.0] 5.0"
    assert max(map(len, lines)) <= 110
    assert "No baseline was trained" in table and "Ties" not in table.replace("Ties count", "")


def test_ties_are_reported_where_they_matter():
    """Claim: a collapsed model's row says how many queries tie and what other conventions would claim."""
    table = render_table(rows_for("untrained", torch.ones(50, 50), "untrained"))
    joined = " ".join(table.split())
    assert "Ties: untrained, held-out concepts, text to image: 50 of 50 queries" in joined
    assert "recall@10 is 20.0 if the first of equals wins, 0.0 if every tie is lost" in joined


def test_ties_that_change_little_are_told_together():
    """Claim: a query that ties below the deepest rank is counted, without a sentence of its own."""
    vectors = torch.eye(50)
    vectors[49] = torch.cat([torch.linspace(0.9, 0.5, 20), torch.zeros(30)])
    vectors[49, [20, 49]] = 0.2
    (note,) = tie_notes(rows_for("after contrastive", vectors))
    assert note.startswith("Ties touch at most 1 queries of a row, and change no recall by more than 0.5 points")


def test_nothing_measured_is_said():
    """Claim: no rows give a sentence, not an empty table."""
    assert render_table([]).startswith("No retrieval was measured")
