"""Precision at 1 over candidate lists, against results worked out by hand."""

import numpy as np
import pytest

from megatron_cocoa.evaluation import mmeb_scores
from megatron_cocoa.evaluation.mmeb_scores import chance_accuracy, majority_accuracy, score_task

ITEMS = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0], [2.0, 0.0]])
"""Item 4 points where item 0 does: another thing with the same vector."""


def lists(*rows):
    return [np.array(row) for row in rows]


def test_hand_computed_scores_with_ties():
    """Claim: right, wrong, won by order and lost by order are told apart, and the three readings are as by hand.

    Query 0 is nearest to its first candidate alone. Query 1 prefers its second. Query 2 ties between its first and
    another thing: argmax gives it the point, the strict reading does not, at random it is half a point. Query 3 ties
    between two wrong ones. Query 4 has the right thing twice in its list: no tie.
    """
    queries = np.array([[1.0, 0.1], [1.0, 0.0], [3.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
    candidates = lists([0, 1, 3], [1, 0, 3], [0, 1, 4], [1, 0, 4], [1, 0, 1])
    found = score_task(queries, ITEMS, candidates)
    assert found.num_pred == 5 and found.num_correct == 3 and found.acc == 0.6
    assert found.num_strict == 2
    assert found.expected == pytest.approx(1 + 0 + 0.5 + 0 + 1)
    assert found.num_ties == 2 and not found.all_tied
    assert found.predictions.tolist() == [0, 1, 0, 1, 0]
    assert found.ranks.tolist() == [1, 2, 1, 3, 1]


def test_a_constant_embedder_is_all_ties():
    """Claim: equal vectors score 100 by the order of the list, and are told: all tie, none is right strictly."""
    found = score_task(np.ones((4, 3)), np.ones((6, 3)), lists([0, 1], [2, 3, 4, 5], [1, 0], [5, 0, 1, 2]))
    assert found.acc == 1.0 and found.all_tied and found.num_strict == 0
    assert found.expected == pytest.approx(0.5 + 0.25 + 0.5 + 0.25)


def test_a_wrong_thing_counts_once_in_a_rank():
    """Claim: a candidate that a list holds twice is one thing before the right one, and the next rank is 2."""
    items = np.array([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    found = score_task(np.array([[1.0, 0.0]]), items, [np.array([0, 1, 1, 2])])
    assert found.ranks.tolist() == [2] and found.num_ties == found.num_correct == 0


def test_the_order_of_wrong_candidates_and_of_queries_changes_nothing():
    """Claim: a score is a function of the rows, not of their order or scale, on random vectors."""
    rng = np.random.default_rng(0)
    queries, items = rng.normal(size=(40, 8)), rng.normal(size=(30, 8))
    candidates = [rng.permutation(30)[: rng.integers(2, 20)] for _ in range(40)]
    wanted = score_task(queries, items, candidates)
    cosine = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (items / np.linalg.norm(items, axis=1)[:, None]).T
    plain = [int(np.argmax(cosine[row, offered])) == 0 for row, offered in enumerate(candidates)]
    assert wanted.num_correct == sum(plain) == wanted.num_strict
    order = rng.permutation(40)
    mixed = [np.concatenate([[offered[0]], rng.permutation(offered[1:])]) for offered in candidates]
    found = score_task(3 * queries[order], items * rng.uniform(1, 9, (30, 1)), [mixed[i] for i in order])
    assert found.num_correct == wanted.num_correct and found.ranks.tolist() == wanted.ranks[order].tolist()


def test_rounding_makes_no_winner():
    """Claim: cosines that differ by float32 rounding tie: a collapsed model is not ranked by its last bits."""
    items = np.array([[1.0, 0.0], [1.0, 1e-7], [1.0, -1e-7]])
    found = score_task(items[:1], items, lists([1, 0, 2]))
    assert found.all_tied and found.num_correct == 1 and found.num_strict == 0


def test_baselines_without_a_model():
    """Claim: chance is the mean of one over the list's length, majority the most frequent right answer's share."""
    candidates = lists([0, 1], [0, 1, 2, 3], [1, 0], [2, 2, 1, 0])
    assert chance_accuracy(candidates) == pytest.approx((0.5 + 0.25 + 0.5 + 0.5) / 4)
    assert majority_accuracy(candidates) == 0.5


@pytest.mark.parametrize("broken", [np.nan, np.inf, 0.0])
def test_broken_vectors_are_refused(broken):
    """Claim: no score is given for vectors that have no direction."""
    items = ITEMS.copy()
    items[3] = broken
    with pytest.raises(ValueError, match=r"1 of 5 things to embed .*row 3"):
        score_task(ITEMS[:1], items, lists([0, 1]))
    with pytest.raises(ValueError, match="2 queries and 1 candidate lists"):
        score_task(ITEMS[:2], ITEMS, lists([0, 1]))


def test_blocks_of_queries_score_as_single_ones(monkeypatch):
    """Claim: whether products are taken with all items or with each list's rows, every number is the same."""
    rng = np.random.default_rng(3)
    items, queries = rng.standard_normal((30, 8)), rng.standard_normal((150, 8))
    items[7] = items[2]  # another thing with the same vector
    candidates = [rng.choice(30, size=rng.integers(1, 30), replace=bool(row % 2)) for row in range(150)]
    found = []
    for waste in (0, 1000):
        monkeypatch.setattr(mmeb_scores, "MOST_WASTE", waste)
        found.append(mmeb_scores.score_task(queries, items, candidates))
    for name in ("num_correct", "num_strict", "expected", "num_ties"):
        assert getattr(found[0], name) == getattr(found[1], name)
    assert np.array_equal(found[0].predictions, found[1].predictions)
    assert np.array_equal(found[0].ranks, found[1].ranks)
