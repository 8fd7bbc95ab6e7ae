"""Retrieval recall: against brute force over every order of ties, against collapse, and its intervals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cocoa.evaluation.metrics import (
    chance_recall,
    evaluate_pairs,
    evaluate_retrieval,
    retrieval_ranks,
    top_candidates,
    wilson_interval,
)


def circle(*degrees: float) -> torch.Tensor:
    """Unit vectors at the given angles: cosine to the query at 0 falls with the angle."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_perfect_and_reversed_embedders():
    """Claim: a perfect embedder scores 1 in both directions at every k; scale does not matter."""
    scales = torch.linspace(0.1, 9.0, 20)[:, None]
    results = evaluate_pairs(torch.eye(20) * scales, torch.eye(20), keys=range(20))
    for result in results.values():
        assert [result.recall[k].value for k in (1, 5, 10)] == [1.0, 1.0, 1.0]
        assert result.median_rank == 1.0 and result.num_tied_queries == 0
    assert set(results) == {"text_to_image", "image_to_text"}


def test_an_all_equal_embedder_scores_chance_and_is_reported():
    """Claim: collapse gives exactly chance as headline, 0 when pessimistic, and every query counts as tied."""
    result = evaluate_pairs(torch.ones(40, 7), torch.ones(40, 7), keys=range(40))["text_to_image"]
    for k in (1, 5, 10):
        assert result.recall[k].value == pytest.approx(k / 40, abs=1e-12)
        assert result.chance[k] == pytest.approx(k / 40, abs=1e-12)
        # First wins: the right item of query i stands at position i.
        assert result.recall_argmax[k] == k / 40
        assert result.recall_pessimistic[k] == 0.0
    assert result.num_tied_queries == 40 and result.median_rank == pytest.approx(20.5)


def test_rounding_noise_does_not_break_a_collapse():
    """Claim: vectors equal up to float32 rounding still tie, so a collapsed model is not ranked by its noise."""
    torch.manual_seed(0)
    noisy = torch.ones(30, 64) * (1 + 1e-5 * torch.randn(30, 64))
    assert evaluate_pairs(noisy, noisy.flip(0), keys=range(30))["image_to_text"].num_tied_queries == 30


def brute_force(scores: list[int], right: list[bool], k: int) -> tuple[float, float]:
    """Recall at k and mean rank of the first right item, averaged over every order that the scores allow."""
    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    ranks = [next(i for i, item in enumerate(order) if right[item]) + 1 for order in orders]
    return sum(rank <= k for rank in ranks) / len(ranks), sum(ranks) / len(ranks)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6), st.integers(1, 7))
def test_expected_recall_equals_the_mean_over_all_orders_of_ties(items, k):
    """Claim: with several right items and ties, the closed form is the average over every possible order."""
    scores, right = [score for score, _ in items], [flag for _, flag in items]
    if not any(right):
        right[0] = True
    candidates = circle(*(90 - 30 * score for score in scores))
    ranks = retrieval_ranks(circle(0), candidates, query_keys=[True], candidate_keys=right)
    recall, mean_rank = brute_force(scores, right, k)
    # Products of at most 6 float64 fractions.
    assert ranks.expected_recall(k).item() == pytest.approx(recall, abs=1e-12)
    assert ranks.expected.item() == pytest.approx(mean_rank, abs=1e-12)
    stable = sorted(range(len(scores)), key=lambda i: -scores[i])
    assert ranks.argmax.item() == next(i for i, item in enumerate(stable) if right[item]) + 1
    assert ranks.pessimistic.item() == 1 + sum(
        s >= max(t for t, good in zip(scores, right) if good) and not good for s, good in zip(scores, right)
    )


def test_the_median_rank_is_that_of_the_middle_query():
    """Claim: one query whose answer comes last moves it nowhere; of two in the middle it lies between."""
    candidates, keys = circle(0, 30, 60, 90), ["a", "b", "c", "d"]
    # Ranks by hand: "a" is first at 0 degrees, "b" second, "c" third, "d" last.
    for wanted, median in ((["a", "a", "d"], 1.0), (["a", "a", "b", "d"], 1.5)):
        queries = circle(*[0.0] * len(wanted))
        assert evaluate_retrieval(queries, candidates, query_keys=wanted, candidate_keys=keys).median_rank == median


def test_a_candidate_that_rounding_puts_before_ties():
    """Claim: a wrong one whose cosine is a few 1e-7 higher is no better one, and counts once, among the ties."""
    candidates = torch.tensor([[1.0, 1.0 + 3e-7], [1.0, 1.0]])
    ranks = retrieval_ranks(torch.tensor([[0.0, 1.0]]), candidates, query_keys=["b"], candidate_keys=["a", "b"])
    assert (ranks.better.tolist(), ranks.tied_wrong.tolist()) == ([0], [1])


def test_equal_captions_are_all_right():
    """Claim: two pictures under one caption answer each other's query, and chance rises accordingly."""
    texts, images = circle(0, 0, 90), circle(40, 5, 90)
    alone = evaluate_pairs(texts, images, keys=[0, 1, 2], ks=(1,))["text_to_image"]
    shared = evaluate_pairs(texts, images, keys=["cat", "cat", "dog"], ks=(1,))["text_to_image"]
    assert alone.recall[1].value == pytest.approx(2 / 3) and shared.recall[1].value == 1.0
    assert alone.chance[1] == pytest.approx(1 / 3) and shared.chance[1] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)


def test_blocks_do_not_change_the_result():
    """Claim: the block size bounds memory only."""
    texts, images = torch.randn(2, 33, 8, generator=torch.Generator().manual_seed(1))
    keys = [i % 11 for i in range(33)]
    results = [evaluate_pairs(texts, images, keys=keys, block_rows=rows) for rows in (1, 7, 512)]
    assert results[0] == results[1] == results[2]
    for rows in (1, 7):
        small, large = (top_candidates(texts, images, k=5, block_rows=r)[0] for r in (rows, 512))
        assert torch.equal(small, large)


def test_top_candidates_orders_by_cosine_then_position():
    """Claim: strips show the best first, and the earlier of equal candidates before the later."""
    indices, cosines = top_candidates(circle(0), circle(60, 30, 60, 0), k=9)
    assert indices.tolist() == [[3, 1, 0, 2]]
    assert cosines[0].tolist() == pytest.approx([1.0, math.sqrt(3) / 2, 0.5, 0.5], abs=1e-6)


def test_chance_equals_the_closed_form():
    """Claim: one right item gives k / n; several give the hypergeometric complement; k beyond n gives 1."""
    assert chance_recall([1, 1], 200, 10) == pytest.approx(0.05)
    assert chance_recall([3], 20, 5) == pytest.approx(1 - math.comb(17, 5) / math.comb(20, 5))
    assert chance_recall([1], 4, 10) == 1.0


def test_wilson_interval_solves_its_defining_equation():
    """Claim: both ends p satisfy (p_hat - p)^2 = z^2 p (1 - p) / n; at 0 and n they touch 0 and 1."""
    z = 1.959963984540054
    for successes, trials in ((3, 40), (20.5, 41), (199, 200)):
        estimate = wilson_interval(successes, trials)
        for end in (estimate.low, estimate.high):
            left = (estimate.value - end) ** 2
            assert left == pytest.approx(z * z * end * (1 - end) / trials, rel=1e-9)
        assert estimate.low < estimate.value < estimate.high
    assert wilson_interval(0, 50).low == 0.0 and wilson_interval(50, 50).high == 1.0
    # Standard table value for 0 of 50.
    assert wilson_interval(0, 50).high == pytest.approx(0.0713, abs=5e-5)


def test_wrong_inputs_are_refused_with_their_numbers():
    """Claim: missing answers, zero or non-finite embeddings and wrong key counts never become a score."""
    eye = torch.eye(3)
    with pytest.raises(ValueError, match="1 of 3 queries have no right candidate .first: row 2, key 9"):
        evaluate_retrieval(eye, eye, query_keys=[0, 1, 9], candidate_keys=[0, 1, 2])
    with pytest.raises(ValueError, match="with 2 keys"):
        evaluate_retrieval(eye, eye, query_keys=[0, 1], candidate_keys=[0, 1, 2])
    with pytest.raises(ValueError, match="1 of 3 candidates are zero or not finite"):
        evaluate_pairs(eye, torch.diag(torch.tensor([1.0, float("nan"), 1.0])), keys=range(3))
    with pytest.raises(ValueError, match="1 of 3 queries are zero"):
        evaluate_pairs(torch.diag(torch.tensor([1.0, 0.0, 1.0])), eye, keys=range(3))
    with pytest.raises(ValueError, match="at least one row"):
        top_candidates(eye[:0], eye, k=1)
    with pytest.raises(ValueError, match="found 3 of 2"):
        wilson_interval(3, 2)
