"""Steps are shared out evenly by cost, packs are filled, and the cost is what the model's layers multiply."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.data.cost import CostModel, SampleSize
from megatron_cocoa.data.loader import StageLoader
from megatron_cocoa.data.packing import _best_sum, assign_samples

QWEN_3B = dict(
    text_config=dict(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=11_008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
    ),
    vision_config=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048),
)


def cost_of_3b() -> CostModel:
    return CostModel.from_architecture(QwenVLArchitecture.from_huggingface(Qwen2_5_VLConfig(**QWEN_3B)))


def realistic_pairs(number: int, seed: int) -> list[list[SampleSize]]:
    """Pairs as in a retrieval mixture: half of the queries and a sixth of the targets have a picture at native size.

    Photographs of 64 to 1,024 merged tokens, prompts and captions of log-normal length around 25 tokens, and a tenth
    of long texts around 200, cut at 512.
    """
    rng = np.random.default_rng(seed)

    def side(share: float) -> SampleSize:
        text = int(np.clip(rng.lognormal(np.log(200 if rng.random() < 0.1 else 25), 0.5), 3, 512))
        patches = (4 * int(rng.integers(64, 1025)),) if rng.random() < share else ()
        tokens = text + 1 + sum(p // 4 + 2 for p in patches)
        return SampleSize(tokens, patches, pairs=tokens**2)

    return [[side(0.5), side(1 / 6)] for _ in range(number)]


def measured(pairs: list[list[SampleSize]]) -> tuple[list[int], list[float]]:
    cost = cost_of_3b()
    return [sum(s.tokens for s in pair) for pair in pairs], [sum(map(cost.flops, pair)) for pair in pairs]


def check_whole(found, number: int, num_ranks: int) -> None:
    seen = [index for rank in found.packs for pack in rank for index in pack]
    assert sorted(seen) == list(range(number))
    assert {sum(map(len, rank)) for rank in found.packs} == {number // num_ranks}
    assert len({len(rank) for rank in found.packs}) == 1 and all(pack for rank in found.packs for pack in rank)


def padded_tokens(found, tokens: list[int], budget: int) -> int:
    """Of all packs, where those of a rank are padded to the longest of them; none exceeds the budget."""
    lengths = [[sum(tokens[i] for i in pack) for pack in rank] for rank in found.packs]
    assert max(max(rank) for rank in lengths) <= budget
    return sum(max(rank) * len(rank) for rank in lengths)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [4096, 8192, 16384])
def test_a_published_step_is_even_over_four_ranks_and_fills_its_packs(seed, budget):
    """Claim: of 1,024 pairs, the worst of four ranks is within 5% of the mean, and 95% of the packs' tokens are those
    of samples."""
    pairs = realistic_pairs(1024, seed)
    tokens, costs = measured(pairs)
    found = assign_samples(tokens, costs, num_ranks=4, samples_per_pack=32, budget=budget)
    check_whole(found, 1024, 4)
    assert sum(tokens) / padded_tokens(found, tokens, budget) >= 0.95
    # Both are of float64 sums; an exchange ends when the two extremes cannot be evened out further.
    assert found.rank_imbalance < 0.05 and found.rank_imbalance == pytest.approx(worst(found, costs), abs=1e-9)


def worst(found, costs) -> float:
    ranks = [sum(costs[i] for pack in rank for i in pack) for rank in found.packs]
    return max(ranks) / np.mean(ranks) - 1


def mini_benchmark_pairs() -> list[list[SampleSize]]:
    """The mini benchmark's training pairs by size, as ``benchmarks/packing.py --lengths`` writes them."""
    table = json.loads((Path(__file__).parent / "mini_lengths.json").read_text(encoding="utf-8"))
    return [
        [SampleSize(tokens, (patches,) if patches else (), pairs, labels) for tokens, patches, pairs, labels in row]
        for row, count in table
        for _ in range(count)
    ]


@pytest.mark.parametrize("budget", [384, 512, 1024, 2048, 4096, 8192])
def test_the_mini_benchmarks_steps_fill_their_packs(budget):
    """Claim: on the mini benchmark's own lengths, steps of 1,024 pairs over four ranks fill 95% of their packs, and the
    worst rank is within 5% of the mean. All 19 whole steps of an epoch count."""
    pairs = mini_benchmark_pairs()
    assert len(pairs) == 19_770
    order = np.random.default_rng(0).permutation(len(pairs))
    filled = capacity = 0
    for step in range(19):
        tokens, costs = measured([pairs[i] for i in order[step * 1024 : (step + 1) * 1024]])
        found = assign_samples(tokens, costs, num_ranks=4, samples_per_pack=1, budget=budget)
        check_whole(found, 1024, 4)
        assert found.rank_imbalance < 0.05
        filled, capacity = filled + sum(tokens), capacity + padded_tokens(found, tokens, budget)
    assert filled / capacity >= 0.95, filled / capacity


def test_a_pack_is_filled_where_any_choice_fills_it():
    """Claim: against all subsets: the chosen sizes have the largest sum that still fits."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes = rng.integers(1, 40, size=int(rng.integers(0, 9))).tolist()
        room = int(rng.integers(0, 120))
        chosen = _best_sum(sizes, room)
        sums = [sum(part) for n in range(len(sizes) + 1) for part in combinations(sizes, n)]
        assert sum(sizes[place] for place in chosen) == max(total for total in sums if total <= room)


def test_packs_that_no_greedy_choice_fills_are_found():
    """Claim: a step that fits exactly is packed exactly; the fullest pack first would need one pack more."""
    tokens = [6, 5, 4, 3, 3, 3, 2, 2, 2, 2, 4, 4]
    found = assign_samples(tokens, [1.0] * 12, num_ranks=1, samples_per_pack=1, budget=10)
    assert sum(tokens) == 40 and len(found.packs[0]) == 4
    check_whole(found, 12, 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_packs_of_equal_number_are_even_too(seed, num_ranks):
    """Claim: without a budget every pack has as many samples as were asked for, and ranks and packs cost the same."""
    tokens, costs = measured(realistic_pairs(256, seed))
    found = assign_samples(tokens, costs, num_ranks=num_ranks, samples_per_pack=16)
    check_whole(found, 256, num_ranks)
    assert {len(pack) for rank in found.packs for pack in rank} == {16}
    in_order = np.asarray(costs).reshape(num_ranks, -1).sum(axis=1)
    assert found.rank_imbalance < 0.05 and found.pack_imbalance < 0.25
    assert num_ranks == 1 or found.rank_imbalance < in_order.max() / in_order.mean() - 1


def test_one_giant_sample_is_the_bound_and_nothing_else():
    costs = [100.0] + [1.0] * 7
    found = assign_samples([5] * 8, costs, num_ranks=2, samples_per_pack=2)
    assert sorted(found.rank_costs) == [4.0, 103.0]


def test_equal_samples_stay_even():
    found = assign_samples([5] * 12, [3.0] * 12, num_ranks=3, samples_per_pack=2)
    assert set(found.rank_costs) == {12.0} and set(found.pack_costs) == {6.0} and found.pack_imbalance == 0


@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_the_number_of_packs_is_a_multiple_of_what_the_pipeline_needs(multiple):
    tokens, costs = measured(realistic_pairs(64, 0))
    found = assign_samples(tokens, costs, num_ranks=2, samples_per_pack=1, budget=4096, packs_multiple_of=multiple)
    assert len(found.packs[0]) % multiple == 0
    check_whole(found, 64, 2)


def test_random_steps_are_shared_out_whole():
    """Claim: whatever the lengths, every sample has one place and no pack exceeds the budget."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        ranks, share = int(rng.integers(1, 5)), int(rng.integers(1, 30))
        tokens = rng.integers(1, 101, size=ranks * share).tolist()
        costs = rng.random(ranks * share).tolist()
        found = assign_samples(tokens, costs, num_ranks=ranks, samples_per_pack=1, budget=100)
        check_whole(found, ranks * share, ranks)
        assert max(sum(tokens[i] for i in pack) for rank in found.packs for pack in rank) <= 100


def test_what_cannot_be_packed_says_why():
    with pytest.raises(ValueError, match="a sample of 120 tokens does not fit into data.tokens_per_microbatch 100"):
        assign_samples([120, 5], [1.0, 1.0], num_ranks=1, samples_per_pack=1, budget=100)
    with pytest.raises(ValueError, match="would need 4 packs for its 2 samples of a step"):
        assign_samples([5, 5], [1.0, 1.0], num_ranks=1, samples_per_pack=1, budget=100, packs_multiple_of=4)


def test_costs_are_what_the_layers_multiply():
    """Claim: the linear part is twice the layers' weights per row, against transformers' own parameters."""
    config = Qwen2_5_VLConfig(
        text_config=QWEN_3B["text_config"] | dict(hidden_size=128, intermediate_size=96, num_hidden_layers=3),
        vision_config=QWEN_3B["vision_config"]
        | dict(
            depth=4, hidden_size=64, intermediate_size=48, num_heads=4, out_hidden_size=128, fullatt_block_indexes=[3]
        ),
    )
    config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    weights = Counter()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            kind = "merger" if ".merger." in name else "visual" if "visual" in name else "language"
            weights["head" if "lm_head" in name or "embed_tokens" in name else kind] += parameter.numel()
    cost = CostModel.from_architecture(QwenVLArchitecture.from_huggingface(config))
    assert cost.per_token == 2 * weights["language"]
    # Three of four blocks look through windows of 8 x 8 patches; the merger works on units of four.
    windows = 4 * 3 * 64 * 64
    assert cost.per_patch == pytest.approx(2 * (weights["visual"] + weights["merger"] / 4) + windows, rel=1e-12)
    assert cost.per_patch_pair == 4 * 1 * 64 and cost.per_pair == 4 * 3 * 128 and cost.per_label == 2 * 128 * 151_936


@pytest.fixture
def make(settings, bundle, architecture):
    def build(stage, changed, *, rank=0, size=1):
        return StageLoader(
            stage, changed, bundle=bundle, architecture=architecture, data_parallel_rank=rank, data_parallel_size=size
        )

    return build


@pytest.mark.parametrize("stage", ["warmup", "bridge", "contrastive"])
@pytest.mark.parametrize("image_size", [None, 70])
def test_the_plan_knows_the_exact_tokens_of_every_sample(make, settings, stage, image_size):
    """Claim: headers and text alone give the very tokens that decoding will, so that no pack bursts its budget."""
    sizes = dict(image_size=image_size)
    changed = replace(settings, **{stage: replace(settings.stage(stage), **sizes)})
    changed = replace(changed, data=replace(changed.data, max_length=60))
    planner = make(stage, changed)._planner
    for step in (0, 8):
        for plan in planner.plan(step):
            batch, counts = planner.execute(plan)
            assert sum(batch.sample_lengths) == sum(row.tokens for row in plan.rows) == counts["tokens"]


def test_the_share_of_the_budget_and_the_imbalance_are_reported(make, settings):
    changed = replace(settings, data=replace(settings.data, tokens_per_microbatch=256, max_length=128))
    loader = make("contrastive", changed)
    filled, packed = 0, 0
    for _ in range(3):
        for batch in loader.next_step():
            filled += sum(batch.sample_lengths)
            packed += batch.num_tokens
            assert batch.num_tokens <= 256
    report = loader.statistics()
    assert report["packs_filled"] == filled / packed
    assert report["rank_imbalance"] == 0 and 0 <= report["pack_imbalance"] < 1


def test_a_budget_does_not_ask_what_micro_batch_size_divides(make, settings):
    """Claim: ``micro_batch_size`` does not count under a budget, also where it would not divide a rank's share."""
    odd = replace(settings, contrastive=replace(settings.contrastive, micro_batch_size=3))
    with pytest.raises(ValueError, match="not divisible by contrastive.micro_batch_size 3"):
        make("contrastive", odd)
    loader = make("contrastive", replace(odd, data=replace(odd.data, tokens_per_microbatch=256, max_length=128)))
    assert sum(len(batch.query_rows) for batch in loader.next_step()) == odd.contrastive.global_batch_size


def test_every_rank_has_as_many_pairs_and_packs_as_the_others(make, settings):
    """Claim: the exchange of embeddings, which needs equal numbers, gets them, also where packs hold what fits."""
    changed = replace(settings, data=replace(settings.data, tokens_per_microbatch=128, max_length=64))
    loaders = [make("contrastive", changed, rank=r, size=2) for r in range(2)]
    for _ in range(4):
        packs = [loader.next_step() for loader in loaders]
        assert len(packs[0]) == len(packs[1])
        for own in packs:
            assert sum(len(batch.query_rows) for batch in own) == 4
            for batch in own:
                queries = [batch.sample_ids[i] for i in batch.query_rows.tolist()]
                targets = [batch.sample_ids[i] for i in batch.target_rows.tolist()]
                assert [q.replace("#query", "#target") for q in queries] == targets
                assert len(batch.target_keys) == len(queries)
