"""The stream of samples does not depend on the layout, resumes to the sample, and hides no failure."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace

import pytest
import torch

from megatron_cocoa.batch import MaskKind
from megatron_cocoa.config import STAGES
from megatron_cocoa.data.loader import StageLoader
from megatron_cocoa.data.order import SampleOrder
from tests.unit.data.rows import NUM_PICTURES

RECORDED_ORDER = [8, 2, 4, 5, 7, 6, 1, 3, 0, 9]


@pytest.fixture
def make(settings, bundle, vision):
    def build(stage, *, rank=0, size=1, changed=settings, **kwargs):
        return StageLoader(
            stage, changed, bundle=bundle, vision=vision, data_parallel_rank=rank, data_parallel_size=size, **kwargs
        )

    return build


def same(a, b):
    a, b = a.materialized(), b.materialized()
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if not (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y):
            return False
    return True


@pytest.mark.parametrize("stage", STAGES)
def test_the_global_batch_is_the_same_at_any_data_parallel_size(make, stage):
    single = make(stage)
    ranks = {size: [make(stage, rank=r, size=size) for r in range(size)] for size in (2, 4)}
    for _ in range(4):
        expected = single.next_step()
        for loaders in ranks.values():
            found = [batch for loader in loaders for batch in loader.next_step()]
            assert len(found) == len(expected) == 4
            assert all(same(a, b) for a, b in zip(expected, found))


def test_samples_do_not_depend_on_the_micro_batch_size(make, settings):
    wide = replace(settings, warmup=replace(settings.warmup, micro_batch_size=8))
    narrow_steps, wide_steps = make("warmup").next_step(), make("warmup", changed=wide).next_step()
    assert len(wide_steps) == 1
    for name in ("input_ids", "pixel_values", "unit_targets", "text_labels"):
        joined = torch.cat([getattr(batch.materialized(), name) for batch in narrow_steps])
        assert torch.equal(joined, getattr(wide_steps[0], name)), name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_equals_never_having_stopped(make, settings, stage, workers):
    changed = replace(settings, data=replace(settings.data, num_workers=workers))
    straight = make(stage, changed=changed)
    for _ in range(5):
        straight.next_step()
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = make(stage, rank=1, size=2, changed=changed)
    resumed.next_step()
    resumed.load_state_dict(state)
    for _ in range(3):
        expected = straight.next_step()[2:]
        assert all(same(a, b) for a, b in zip(expected, resumed.next_step()))
    straight.close()
    resumed.close()


def test_a_background_thread_changes_nothing(make, settings):
    ahead = make("warmup", changed=replace(settings, data=replace(settings.data, num_workers=2)))
    plain = make("warmup")
    for _ in range(7):
        assert all(same(a, b) for a, b in zip(plain.next_step(), ahead.next_step()))
        assert plain.statistics() == ahead.statistics() and plain.state_dict() == ahead.state_dict()
    ahead.close()
    ahead.close()


def test_each_epoch_sees_every_row_once_and_in_another_order(make):
    loader = make("warmup")
    epochs = [[i for _ in range(NUM_PICTURES // 8) for b in loader.next_step() for i in b.sample_ids] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"row-{i}" for i in range(NUM_PICTURES))
    assert epochs[0] != epochs[1]


def test_orders_differ_by_seed_and_stage():
    orders = [
        [SampleOrder(50, seed=seed, stage=stage).at(i)[1] for i in range(50)]
        for seed, stage in ((1, "warmup"), (2, "warmup"), (1, "bridge"))
    ]
    assert orders[0] != orders[1] and orders[0] != orders[2] and sorted(orders[0]) == list(range(50))


def test_rows_of_one_group_are_a_round_apart():
    """Each third of an epoch holds each group of three once; all rows still come exactly once."""
    order = SampleOrder(60, seed=1, stage="contrastive", groups=[i % 20 for i in range(60)])
    for epoch in range(3):
        rows = [order.at(60 * epoch + i)[1] for i in range(60)]
        assert sorted(rows) == list(range(60)) and rows[:20] != sorted(rows[:20])
        for start in (0, 20, 40):
            assert sorted(row % 20 for row in rows[start : start + 20]) == list(range(20))


def test_both_directions_of_a_pair_do_not_meet_in_one_step(make):
    """In one step, the text of one would be its own negative in the other."""
    loader = make("contrastive")
    for _ in range(4 * NUM_PICTURES // 8):
        ids = [i for batch in loader.next_step() for i in batch.sample_ids if i.endswith("#query")]
        assert len(set(ids)) == len(ids) == 8


def test_mask_kinds_follow_the_settings(make, settings):
    strict = replace(settings, bridge=replace(settings.bridge, bridge_sees_target=False))
    assert make("warmup").next_step()[0].mask_kind is MaskKind.BIDIRECTIONAL
    assert make("bridge").next_step()[0].mask_kind is MaskKind.EOS_BRIDGED
    assert make("bridge", changed=strict).next_step()[0].mask_kind is MaskKind.EOS_BRIDGED_STRICT
    assert make("contrastive").next_step()[0].mask_kind is MaskKind.BIDIRECTIONAL


def test_effective_ratios_are_reported(make):
    loader = make("bridge")
    for _ in range(30):
        loader.next_step()
    report = loader.statistics()
    assert report["samples"] == 240 and report["rows"] == NUM_PICTURES
    # About 2,900 draws at 0.7 (standard error 0.009), lifted a little on the shortest captions.
    assert 0.67 < report["text_mask_ratio"] < 0.75
    assert report["unit_mask_ratio"] == 0.0


def test_query_units_can_be_masked_in_stage_bridge(make, settings):
    changed = replace(settings, bridge=replace(settings.bridge, query_unit_mask_ratio=0.5))
    noisy, clean = make("bridge", changed=changed).next_step()[0], make("bridge").next_step()[0]
    assert torch.equal(noisy.input_ids, clean.input_ids) and noisy.unit_positions is None
    changed_rows = (noisy.pixel_values != clean.pixel_values).any(dim=1).float().mean()
    assert 0.25 < changed_rows < 0.75


def test_packs_fill_the_budget(make, settings):
    changed = replace(settings, data=replace(settings.data, tokens_per_microbatch=128))
    for batch in make("contrastive", changed=changed, pad_to_multiple_of=4).next_step():
        assert batch.num_tokens == 128 and batch.tail_length == 128 - sum(batch.sample_lengths)


@pytest.fixture
def broken_folder(data_folder, tmp_path):
    shutil.copytree(data_folder, tmp_path / "pairs")
    for i in (3, 11):
        (tmp_path / "pairs" / "images" / f"{i}.png").write_bytes(b"no picture")
    return tmp_path / "pairs"


def test_broken_pictures_are_counted_and_replaced_alike_on_every_rank(make, settings, broken_folder):
    changed = replace(settings, data=replace(settings.data, path=str(broken_folder)))
    single, ranks = make("warmup", changed=changed), [make("warmup", rank=r, size=2, changed=changed) for r in (0, 1)]
    pixel_free = make("warmup", changed=changed, needs_pixels=False, needs_unit_targets=False)
    seen = []
    for _ in range(NUM_PICTURES // 8):
        batches = single.next_step()
        found = [batch for loader in ranks for batch in loader.next_step()]
        assert all(same(a, b) for a, b in zip(batches, found))
        assert [b.sample_ids for b in pixel_free.next_step()] == [b.sample_ids for b in batches]
        seen += [i for batch in batches for i in batch.sample_ids]
    assert len(seen) == NUM_PICTURES and not {"row-3", "row-11"} & set(seen)
    assert single.statistics()["skipped/unreadable_picture"] >= 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_without_pictures_ends_in_an_error(make, settings, broken_folder, workers):
    shutil.rmtree(broken_folder / "images")
    data = replace(settings.data, path=str(broken_folder), num_workers=workers)
    loader = make("warmup", changed=replace(settings, data=data))
    with pytest.raises(ValueError, match="rows one after the other have unusable pictures.*is not a file"):
        loader.next_step()
    loader.close()


def test_errors_of_the_background_thread_surface(make, settings, data_folder, tmp_path):
    shutil.copytree(data_folder, tmp_path / "pairs")
    data = replace(settings.data, path=str(tmp_path / "pairs"), num_workers=1)
    loader = make("warmup", changed=replace(settings, data=data))
    shutil.rmtree(tmp_path / "pairs" / "images")
    with pytest.raises(ValueError, match="unusable pictures"):
        for _ in range(NUM_PICTURES):
            loader.next_step()
    loader.close()


def test_too_many_broken_pictures_end_the_run(make, settings, broken_folder):
    for i in range(12, 18):
        (broken_folder / "images" / f"{i}.png").unlink()
    loader = make("warmup", changed=replace(settings, data=replace(settings.data, path=str(broken_folder))))
    with pytest.raises(ValueError, match=r"pictures could not be used for \d+ rows .*missing_picture.*at most 5%"):
        for _ in range(20):
            loader.next_step()


def test_a_state_of_another_stream_is_refused(make):
    state = make("warmup").state_dict()
    with pytest.raises(ValueError, match="the saved loader state is of"):
        make("bridge").load_state_dict(state)
    with pytest.raises(ValueError, match="'num_rows': 7"):
        make("warmup").load_state_dict({**state, "num_rows": 7})


def test_more_pairs_per_step_than_there_are_is_refused(make, settings):
    large = replace(settings.contrastive, global_batch_size=64, micro_batch_size=8)
    with pytest.raises(ValueError, match=r"has 48 pairs, contrastive.global_batch_size is 64"):
        make("contrastive", changed=replace(settings, contrastive=large))


def test_missing_paths_and_wrong_ranks_are_refused(make, settings):
    with pytest.raises(ValueError, match="data.path and model.path"):
        make("warmup", changed=replace(settings, data=replace(settings.data, path=None)))
    with pytest.raises(ValueError, match="data_parallel_rank is 2"):
        make("warmup", rank=2, size=2)
    with pytest.raises(ValueError, match="not divisible"):
        make("warmup", size=3)


def test_random_stream_is_stable_across_versions():
    """A recorded order: a change would silently make old checkpoints resume on another stream."""
    assert [SampleOrder(10, seed=1234, stage="warmup").at(i)[1] for i in range(10)] == RECORDED_ORDER


@pytest.mark.parametrize("stage", STAGES)
def test_only_the_first_of_several_packs_holds_its_pixels(make, settings, stage):
    """Claim: a step of many packs does not hold the pixels of all of them, nor does a step of one defer anything."""
    first, *others = make(stage).next_step()
    assert first.pixel_values is not None and first.deferred is None
    assert others and all(batch.pixel_values is None and batch.unit_targets is None for batch in others)
    changed = replace(getattr(settings, stage), micro_batch_size=8)
    (alone,) = make(stage, changed=replace(settings, **{stage: changed})).next_step()
    assert alone.pixel_values is not None and alone.deferred is None
