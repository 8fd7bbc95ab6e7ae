"""Hard negatives and per-source batches: what a contrastive step holds, whatever the layout, and after a resume."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_cocoa.data.loader import StageLoader
from megatron_cocoa.data.source_order import SourceOrder
from tests.unit.data.rows import pair, write_jsonl

SIZES = {"VQA": 21, "retrieval": 16, "grounding": 9}
BATCH = 8
ALONE = dict(data_parallel_rank=0, data_parallel_size=1)


@pytest.fixture
def folder(data_folder, tmp_path):
    """46 text pairs of three sources; row i has i % 4 hard negatives."""
    rows, number = [], 0
    for source, size in SIZES.items():
        for _ in range(size):
            negatives = [f"negative {k} of {number}" for k in range(number % 4)]
            columns = dict(qry=f"query {number}", pos_text=f"target {number}", neg_text=negatives, source=source)
            rows.append(pair(f"{source}-{number}", **columns))
            number += 1
    write_jsonl(tmp_path / "contrastive.jsonl", rows)
    return tmp_path


@pytest.fixture
def make(settings, bundle, architecture, folder):
    def build(*, rank=0, size=1, **contrastive):
        changed = replace(
            settings,
            data=replace(settings.data, path=str(folder)),
            contrastive=replace(settings.contrastive, **contrastive),
        )
        return StageLoader(
            "contrastive",
            changed,
            bundle=bundle,
            architecture=architecture,
            data_parallel_rank=rank,
            data_parallel_size=size,
        )

    return build


def names(step) -> list[str]:
    return [name for batch in step for name in batch.sample_ids]


def queries(step) -> list[str]:
    return [name.removesuffix("#query") for name in names(step) if name.endswith("#query")]


def source_of(name: str) -> str:
    return name.split("-")[0]


def test_each_step_holds_one_source_and_each_epoch_all_full_steps(make):
    """Claim: 21, 16 and 9 rows give 2, 2 and 1 steps of 8; 6 rows sit out, other ones in the next epoch."""
    loader = make(per_source_batches=True)
    epochs = []
    for _ in range(6):
        steps = [queries(loader.next_step()) for _ in range(5)]
        found = [{source_of(name) for name in step} for step in steps]
        assert all(len(sources) == 1 for sources in found)
        assert sorted(next(iter(sources)) for sources in found) == ["VQA", "VQA", "grounding", "retrieval", "retrieval"]
        rows = [name for step in steps for name in step]
        assert len(set(rows)) == 40
        epochs.append((frozenset(rows), [next(iter(sources)) for sources in found]))
    assert len({rows for rows, _ in epochs}) > 1 and len({tuple(order) for _, order in epochs}) > 1
    report = loader.statistics()
    assert report["left_out_per_epoch"] == 6
    assert {name: report[f"source/{name}"] for name in SIZES} == {"VQA": 16, "retrieval": 16, "grounding": 8}


def test_per_source_steps_do_not_depend_on_the_layout_and_resume_exactly(make):
    """Claim: two ranks share what one sees, shared out by cost; a resumed loader goes on as if it had never stopped."""
    single, ranks = make(per_source_batches=True), [make(per_source_batches=True, rank=r, size=2) for r in (0, 1)]
    for _ in range(7):
        halves = [names(loader.next_step()) for loader in ranks]
        assert sorted(names(single.next_step())) == sorted(halves[0] + halves[1]) and len(halves[0]) == len(halves[1])
    resumed = make(per_source_batches=True)
    resumed.load_state_dict(json.loads(json.dumps(single.state_dict())))
    for _ in range(4):
        assert names(resumed.next_step()) == names(single.next_step())


def test_a_mixed_run_does_not_resume_on_a_per_source_stream(make):
    """Claim: the stream differs, and with it what has been seen."""
    state = make().state_dict()
    with pytest.raises(ValueError, match="per_source_batch_size"):
        make(per_source_batches=True).load_state_dict(state)


def test_a_source_that_never_fills_a_step_is_refused_with_its_size(make):
    with pytest.raises(ValueError, match=r"2 of 3 sources have fewer rows .*global_batch_size 20.*'grounding': 9"):
        make(per_source_batches=True, global_batch_size=20, micro_batch_size=20)


def test_sources_must_be_named(settings, bundle, architecture):
    changed = replace(settings, contrastive=replace(settings.contrastive, per_source_batches=True))
    with pytest.raises(ValueError, match="column 'source'.*none does"):
        StageLoader("contrastive", changed, bundle=bundle, architecture=architecture, **ALONE)


def test_a_pair_and_its_reverse_stay_apart_within_a_source():
    """Claim: the rounds of ``SampleOrder.groups`` hold in each source: no step but one between rounds has both."""
    groups = [f"pair {i % 24}" for i in range(48)]
    order = SourceOrder(["one"] * 48, batch_size=8, seed=3, stage="contrastive", groups=groups)
    for start in range(0, 96, 8):
        rows = [order.at(position)[1] for position in range(start, start + 8)]
        assert len({groups[row] for row in rows}) == 8


def test_a_substitute_comes_from_the_same_source():
    sources = ["a"] * 10 + ["b"] * 10
    order = SourceOrder(sources, batch_size=5, seed=1, stage="contrastive")
    for position in range(40):
        _, row = order.at(position)
        assert {sources[found] for found in order.substitutes(position)} == {sources[row]}


def negatives_by_query(step) -> dict[str, list[str]]:
    """The texts that a query's negatives were made of, told by their token ids."""
    found: dict[str, list[str]] = {}
    for batch in step:
        ends = list(batch.bridge_positions)
        starts = [0, *(end + 1 for end in ends[:-1])]
        ids = [tuple(batch.input_ids[start:end].tolist()) for start, end in zip(starts, ends)]
        for query, row in zip(batch.query_rows.tolist(), batch.negative_rows.tolist()):
            found[batch.sample_ids[query].removesuffix("#query")] = [ids[i] for i in row if i >= 0]
    return found


def test_negatives_are_drawn_anew_each_epoch_and_alike_at_any_layout(make, bundle):
    """Claim: a row has min(its own, asked) negatives, of its own; the draw depends on seed, epoch and row alone."""
    options = dict(num_hard_negatives=2, per_source_batches=True)
    single, ranks = make(**options), [make(**options, rank=r, size=2) for r in (0, 1)]
    draws: dict[str, set] = {}
    for _ in range(40):
        step = negatives_by_query(single.next_step())
        spread = {k: v for loader in ranks for k, v in negatives_by_query(loader.next_step()).items()}
        assert spread == step
        for name, ids in step.items():
            number = int(name.split("-")[1])
            own = [tuple(bundle.encode_text(f"negative {k} of {number}").tolist()) for k in range(number % 4)]
            assert len(ids) == min(2, number % 4) and len(set(ids)) == len(ids) and set(ids) <= set(own)
            draws.setdefault(name, set()).add(tuple(ids))
    by_available = {n: max(len(d) for name, d in draws.items() if int(name.split("-")[1]) % 4 == n) for n in range(4)}
    assert by_available[1] == by_available[2] == 1 and by_available[3] > 1
    # Of 46 rows, those with 0 or 1 negatives are numbers 0, 4, .. 44 and 1, 5, .. 45.
    assert single.statistics()["rows_with_fewer_hard_negatives"] == 24


def test_statistics_look_at_the_rows_once(make):
    """Claim: asked for after every step, as a replica's reader is, statistics do not go through all rows again."""
    loader = make(num_hard_negatives=2, per_source_batches=True)
    first = loader.statistics()
    loader._data.row_set = replace(loader._data.row_set, rows=range(len(loader._data.row_set.rows)))
    assert loader.statistics() == first


def test_hard_negatives_without_any_in_the_file_are_refused(settings, bundle, architecture):
    changed = replace(settings, contrastive=replace(settings.contrastive, num_hard_negatives=1))
    with pytest.raises(ValueError, match="num_hard_negatives is 1, but no row of .* has a hard negative"):
        StageLoader("contrastive", changed, bundle=bundle, architecture=architecture, **ALONE)
