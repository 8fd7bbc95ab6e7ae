"""No contrastive step holds a row twice: not where epochs or sources meet, nor in place of a broken picture."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import islice

import pytest

from megatron_cocoa.config import DataSettings, SourceSettings
from megatron_cocoa.data.loader import StageLoader
from megatron_cocoa.data.mixture import BLOCK, MixedOrder
from megatron_cocoa.data.order import MAX_SUBSTITUTES, SampleOrder, drawn_rows, steps_of
from tests.unit.data.rows import NUM_PICTURES, by_sample, equal_samples, pair, write_jsonl

MIXTURES = {
    "equal-weights": ([("small", 100, 1.0), ("large", 10_000, 1.0)], 200),
    "epochs-shorter-than-two-steps": ([("a", 60, 0.05), ("b", 400, 0.35), ("c", 5000, 0.6)], 1000),
    "less-than-a-row-a-step": ([("a", 40, 1.0), ("b", 3, 0.01), ("c", 100, 2.0)], 3),
    "step-longer-than-a-block": ([("a", 5000, 1.0), ("b", 3300, 0.5)], BLOCK + 904),
}


def assert_no_repeats(order: SampleOrder | MixedOrder, batch_size: int, num_steps: int) -> list[tuple[int, int]]:
    """Each step's rows are distinct; returns the stream."""
    stream = [order.at(position) for position in range(batch_size * num_steps)]
    for start in range(0, len(stream), batch_size):
        assert len({row for _, row in stream[start : start + batch_size]}) == batch_size, start
    return stream


@pytest.mark.parametrize("num_rows", [64, 65, 100, 127, 128, 150, 191, 1000])
@pytest.mark.parametrize("grouped", [False, True])
def test_where_epochs_meet_no_row_comes_twice_and_each_epoch_has_every_row_once(num_rows, grouped):
    """Claim: with barely as many rows as a step has up to many times that, from any position on without a state."""
    groups = [row // 2 for row in range(num_rows)] if grouped else None
    options = dict(seed=5, stage="s", step_of=steps_of(64), groups=groups)
    stream = assert_no_repeats(SampleOrder(num_rows, **options), 64, num_steps=12 * num_rows // 64)
    for start in range(0, len(stream) - num_rows + 1, num_rows):
        epochs, rows = zip(*stream[start : start + num_rows])
        assert set(epochs) == {start // num_rows} and sorted(rows) == list(range(num_rows))
    for position in range(0, len(stream), 97):
        assert SampleOrder(num_rows, **options).at(position) == stream[position]


def test_only_the_first_step_of_an_epoch_differs_from_the_order_that_repeats():
    plain, apart = (SampleOrder(1000, seed=5, stage="s", step_of=step_of) for step_of in (None, steps_of(64)))
    for epoch in range(5):
        positions = range(1000 * epoch, 1000 * epoch + 1000)
        differing = [i - positions[0] for i in positions if plain.at(i) != apart.at(i)]
        assert all(offset < 64 for offset in differing) and bool(differing) == bool(epoch)


def test_a_pair_and_its_reverse_do_not_meet_where_epochs_do():
    """Claim: of 2 x 100 rows in two rounds, no step holds both of a pair but the one in which the rounds meet."""
    order = SampleOrder(200, seed=2, stage="s", groups=[i % 100 for i in range(200)], step_of=steps_of(16))
    for start in range(0, 16 * 100, 16):
        rows = [order.at(position)[1] % 100 for position in range(start, start + 16)]
        rounds_meet = any(position % 200 == 100 for position in range(start + 1, start + 16))
        assert len(set(rows)) == 16 or rounds_meet


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_repeats_no_row_in_a_step_and_keeps_its_shares(name):
    """Claim: as above for each source, whose rows a step holds by its share to one row or two."""
    parts, batch_size = MIXTURES[name]
    order = MixedOrder(parts, seed=5, stage="s", batch_size=batch_size)
    stream = assert_no_repeats(order, batch_size, num_steps=12_000 // batch_size)
    start, total = 0, sum(weight for _, _, weight in parts)
    for _, num_rows, weight in parts:
        is_own = [start <= row < start + num_rows for _, row in stream]
        for first in range(0, len(stream), batch_size):
            assert abs(sum(is_own[first : first + batch_size]) - batch_size * weight / total) < 2
        own = [(epoch, row - start) for (epoch, row), own in zip(stream, is_own) if own]
        for first in range(0, len(own) - num_rows + 1, num_rows):
            epochs, rows = zip(*own[first : first + num_rows])
            assert set(epochs) == {first // num_rows} and sorted(rows) == list(range(num_rows))
        start += num_rows
    for position in range(0, len(stream), 997):
        assert MixedOrder(parts, seed=5, stage="s", batch_size=batch_size).at(position) == stream[position]


@pytest.mark.parametrize("batch_size", [None, 16])
def test_a_pair_and_its_reverse_stay_apart_in_any_source_of_a_mixture(batch_size):
    """Claim: groups are those of the source's own rows, also behind another source."""
    groups = [*range(1000, 1150), *(i % 100 for i in range(200))]
    order = MixedOrder([("a", 150, 1.0), ("b", 200, 1.0)], seed=5, stage="s", groups=groups, batch_size=batch_size)
    own = [row for _, row in map(order.at, range(2000)) if row >= 150][:900]
    for start in range(0, 900, 100):
        assert sorted(groups[row] for row in own[start : start + 100]) == list(range(100))


@pytest.mark.parametrize("batch_size", [None, 16])
def test_sources_of_a_mixture_alternate_otherwise_in_each_block(batch_size):
    order = MixedOrder([("a", 150, 1.0), ("b", 200, 1.0)], seed=5, stage="s", batch_size=batch_size)
    first, second = ([order.at(start + i)[1] < 150 for i in range(BLOCK)] for start in (0, BLOCK))
    assert sum(first) == sum(second) == BLOCK // 2 and first != second


def test_a_weighted_source_with_fewer_rows_than_its_share_of_a_step_is_refused():
    parts = [("small", 100, 1.0), ("large", 10_000, 1.0)]
    with pytest.raises(ValueError, match="small has 100 rows, .* weight 1 a step of 1024 holds up to 512 .*lower"):
        MixedOrder(parts, seed=5, stage="contrastive", batch_size=1024)


def test_substitutes_of_the_places_of_a_step_are_other_rows():
    """Claim: no two places draw the same row, and a place whose own rows are all taken gets to every other."""
    for num_rows, num_places in ((1000, 48), (50, 48), (48, 48)):
        drawn: set[int] = set()
        for place in range(num_places):
            rows = list(drawn_rows(num_rows, key=(3, place), share=(place, num_places)))
            own = set(rows[:MAX_SUBSTITUTES])
            assert not own & drawn and set(rows) == set(range(num_rows))
            drawn |= own


@pytest.fixture
def folder(data_folder, tmp_path):
    """The pairs of ``data_folder``, both directions of each, under names of their own and of one source."""
    shutil.copytree(data_folder, tmp_path / "pairs")
    lines = (data_folder / "contrastive.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"id": f"pair-{number}", "source": "s"} for number, line in enumerate(lines)]
    write_jsonl(tmp_path / "pairs" / "contrastive.jsonl", rows)
    return tmp_path / "pairs"


@pytest.fixture
def make(settings, bundle, architecture):
    def build(data, *, rank=0, size=1, seed=settings.seed, **contrastive):
        contrastive = replace(settings.contrastive, **contrastive)
        changed = replace(settings, seed=seed, data=data, contrastive=contrastive)
        place = dict(data_parallel_rank=rank, data_parallel_size=size)
        return StageLoader("contrastive", changed, bundle=bundle, architecture=architecture, **place)

    return build


@pytest.mark.parametrize("weight", [None, 1.0])
def test_steps_of_the_loader_repeat_no_row_at_any_size_and_after_a_resume(make, folder, tmp_path, weight):
    """Claim: ranks share out steps of distinct rows, the same that a loader gives which has resumed."""
    rows = write_jsonl(tmp_path / "b.jsonl", [pair(f"{i}", qry=f"q {i}", pos_text=f"p {i}") for i in range(11)])
    sources = tuple(SourceSettings(path.stem, str(path), weight=weight) for path in (folder, rows))
    data, sizes = DataSettings(sources=sources), dict(global_batch_size=20, micro_batch_size=5)
    single, ranks = make(data, **sizes), [make(data, rank=r, size=2, **sizes) for r in (0, 1)]
    for _ in range(12):
        state = json.loads(json.dumps(single.state_dict()))
        # Names that occur twice are refused by ``by_sample``.
        step = by_sample(single.next_step())
        assert len(step) == 40
        assert equal_samples(step, by_sample([batch for loader in ranks for batch in loader.next_step()]))
    resumed = make(data, **sizes)
    resumed.load_state_dict(state)
    assert equal_samples(step, by_sample(resumed.next_step()))


@pytest.mark.parametrize("image_size", [70, None], ids=["found-by-decoding", "found-by-the-header"])
@pytest.mark.parametrize("per_source", [False, True], ids=["mixed", "per-source"])
def test_rows_in_place_of_broken_ones_repeat_none(make, folder, image_size, per_source):
    """Claim: two ranks that know nothing of each other, with a third of the pictures broken, take no row twice."""
    broken = range(0, NUM_PICTURES, 3)
    for number in broken:
        (folder / "images" / f"{number}.png").write_bytes(b"no picture")
    options = dict(image_size=image_size, per_source_batches=per_source)
    for seed in range(12):
        ranks = [make(DataSettings(path=str(folder)), rank=r, size=2, seed=seed, **options) for r in (0, 1)]
        step = by_sample([batch for loader in ranks for batch in loader.next_step()])
        numbers = {int(name.split("#")[0].removeprefix("pair-")) % NUM_PICTURES for name in step}
        assert len(step) == 16 and not numbers & set(broken)


def test_a_step_that_needs_every_row_ends_where_one_cannot_be_used(make, folder):
    (folder / "images" / "3.png").unlink()
    loader = make(DataSettings(path=str(folder)), global_batch_size=48, micro_batch_size=6)
    with pytest.raises(ValueError, match="1 rows one after the other .*may hold no row twice.*3.png is not a file"):
        loader.next_step()


def test_other_stages_draw_as_before():
    """Recorded: where steps may repeat rows, another draw would change the streams of runs that are under way."""
    drawn = SampleOrder(1000, seed=1234, stage="warmup").substitutes(7)
    assert list(islice(drawn, 4)) == [869, 431, 415, 677]
