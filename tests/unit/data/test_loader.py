"""The stream of samples does not depend on the layout, resumes to the sample, and hides no failure."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import fields, replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from megatron_cocoa.batch import MaskKind
from megatron_cocoa.config import STAGES, DataSettings, SourceSettings
from megatron_cocoa.data.feed import lost_workers_explained, packs_from
from megatron_cocoa.data.loader import StageLoader
from megatron_cocoa.data.order import MAX_SUBSTITUTES, SampleOrder
from tests.unit.data.rows import NUM_PICTURES, by_sample, equal_samples, write_jsonl

RECORDED_ORDER = [8, 2, 4, 5, 7, 6, 1, 3, 0, 9]


@pytest.fixture
def make(settings, bundle, architecture):
    def build(stage, *, rank=0, size=1, changed=settings, **kwargs):
        return StageLoader(
            stage,
            changed,
            bundle=bundle,
            architecture=architecture,
            data_parallel_rank=rank,
            data_parallel_size=size,
            **kwargs,
        )

    return build


def names_of(batches):
    return sorted(name for batch in batches for name in batch.sample_ids)


def same(a, b):
    a, b = a.materialized(), b.materialized()
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if not (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y):
            return False
    return True


@pytest.mark.parametrize("stage", STAGES)
def test_the_global_batch_is_the_same_at_any_data_parallel_size(make, stage):
    """Claim: ranks and packs decide where a sample lies, never which samples a step has or what they hold."""
    single = make(stage)
    ranks = {size: [make(stage, rank=r, size=size) for r in range(size)] for size in (2, 4)}
    for _ in range(4):
        expected = by_sample(single.next_step())
        for loaders in ranks.values():
            found = [batch for loader in loaders for batch in loader.next_step()]
            assert len(found) == 4 and equal_samples(expected, by_sample(found))


def test_a_picture_size_that_does_not_fit_is_told_with_its_stage(make, settings, vision):
    """Claim: whoever trains three stages reads which one's setting is meant, and what it can be."""
    factor = vision.size_factor
    odd = replace(settings, bridge=replace(settings.bridge, image_size=4 * factor + 1))
    message = rf"bridge.image_size {4 * factor + 1} is not a multiple of {factor} .*: {4 * factor} or {5 * factor} is"
    with pytest.raises(ValueError, match=message):
        make("bridge", changed=odd)


def test_samples_do_not_depend_on_the_micro_batch_size(make, settings):
    wide = replace(settings, warmup=replace(settings.warmup, micro_batch_size=8))
    narrow_steps, wide_steps = make("warmup").next_step(), make("warmup", changed=wide).next_step()
    assert len(wide_steps) == 1 and len(narrow_steps) == 4
    assert equal_samples(by_sample(narrow_steps), by_sample(wide_steps))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_equals_never_having_stopped(make, settings, stage, workers):
    """Claim: a run killed at any step goes on with the same samples, also at other data-parallel sizes."""
    changed = replace(settings, data=replace(settings.data, num_workers=workers))
    straight = make(stage, changed=changed)
    for _ in range(5):
        straight.next_step()
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = [make(stage, rank=r, size=2, changed=changed) for r in range(2)]
    for loader in resumed:
        loader.next_step()
        loader.load_state_dict(state)
    for _ in range(3):
        found = [batch for loader in resumed for batch in loader.next_step()]
        assert equal_samples(by_sample(straight.next_step()), by_sample(found))
    for loader in (straight, *resumed):
        loader.close()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_epoch_has_every_sample_once_at_any_data_parallel_size(make, settings, size):
    """Claim: the ranks of a step share it out; nothing comes twice in an epoch and nothing is left out."""
    changed = replace(settings, warmup=replace(settings.warmup, global_batch_size=6, micro_batch_size=1))
    loaders = [make("warmup", rank=r, size=size, changed=changed) for r in range(size)]
    for _ in range(2):
        epoch = [i for _ in range(NUM_PICTURES // 6) for x in loaders for b in x.next_step() for i in b.sample_ids]
        assert sorted(epoch) == sorted(f"row-{i}" for i in range(NUM_PICTURES))


@pytest.mark.parametrize("sizes", [(1, 3), (3, 2), (2, 1)])
@pytest.mark.parametrize("stop", [1, 5])
def test_a_killed_run_goes_on_with_the_same_sequence_at_another_size(make, settings, sizes, stop):
    """Claim: stopped after any step, the remaining steps have the samples that they would have had."""
    changed = replace(settings, warmup=replace(settings.warmup, global_batch_size=6, micro_batch_size=1))
    before, after = ([make("warmup", rank=r, size=s, changed=changed) for r in range(s)] for s in sizes)
    for _ in range(stop):
        states = [loader.next_step() and loader.state_dict() for loader in before]
    for loader in after:
        loader.load_state_dict(states[-1])
    for _ in range(6):
        expected, found = ([b for loader in group for b in loader.next_step()] for group in (before, after))
        assert equal_samples(by_sample(expected), by_sample(found))


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_change_nothing(make, settings, workers):
    ahead = make("warmup", changed=replace(settings, data=replace(settings.data, num_workers=workers)))
    plain = make("warmup")
    for _ in range(7):
        assert all(same(a, b) for a, b in zip(plain.next_step(), ahead.next_step()))
        # A worker's cache holds what that worker has decoded.
        hidden = {"decoded": 0}
        assert plain.statistics() | hidden == ahead.statistics() | hidden and plain.state_dict() == ahead.state_dict()
    assert len(multiprocessing.active_children()) >= workers
    ahead.close()
    ahead.close()
    assert not multiprocessing.active_children()


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
    causal = replace(settings, contrastive=replace(settings.contrastive, attention="causal"))
    assert make("contrastive", changed=causal).next_step()[0].mask_kind is MaskKind.CAUSAL
    sizes = [
        make("contrastive", changed=changed)._planner._data for changed in (settings, causal)
    ]  # fmt: skip
    builder = make("contrastive")._planner._builder
    for both, seen_before in zip(*(data.measure(data.row_set.rows[0], builder, epoch=0) for data in sizes)):
        n = both.tokens
        assert (both.pairs, seen_before.pairs) == (n * n, n * (n + 1) // 2)
    assert make("warmup", changed=causal).next_step()[0].mask_kind is MaskKind.BIDIRECTIONAL


def test_settings_of_the_decision_table_reach_the_batches(make, settings, bundle):
    """Claim: what a stage's settings say of patches, eligible tokens and placeholders is in what the loader gives."""
    patch = replace(settings, warmup=replace(settings.warmup, masked_unit="patch"))
    batch = make("warmup", changed=patch).next_step()[0]
    assert batch.unit_patches.any() and not batch.unit_patches.all()
    assert make("warmup").next_step()[0].unit_patches is None
    words = replace(settings, bridge=replace(settings.bridge, eligible_tokens="words", target_mask_ratio=1.0))
    assert bundle.is_word(make("bridge", changed=words).next_step()[0].text_labels.numpy()).all()
    for stage, ratio in (("warmup", "text_mask_ratio"), ("bridge", "target_mask_ratio")):
        for at_least_one in (True, False):
            rare = replace(settings.stage(stage), mask_at_least_one=at_least_one, **{ratio: 1e-9})
            batches = make(stage, changed=replace(settings, **{stage: rare})).next_step()
            assert sum(batch.text_labels.numel() for batch in batches) == 8 * at_least_one
    bare = replace(settings, contrastive=replace(settings.contrastive, image_placeholder="bare"))
    for changed, has_marks in ((settings, True), (bare, False)):
        ids = make("contrastive", changed=changed).next_step()[0].input_ids
        assert bool((ids == bundle.vision_start_token_id).any()) is has_marks
        assert bool((ids == bundle.image_token_id).any())


@pytest.mark.parametrize("stage", ["warmup", "bridge"])
def test_the_longest_sample_is_the_settings(make, settings, stage):
    """Claim: ``data.max_length`` cuts texts, and what it cuts is counted."""
    whole = max(length for batch in make(stage).next_step() for length in batch.sample_lengths)
    loader = make(stage, changed=replace(settings, data=replace(settings.data, max_length=whole - 2)))
    assert max(length for batch in loader.next_step() for length in batch.sample_lengths) == whole - 2
    assert loader.statistics()["cut_tokens"] > 0


def test_settings_of_pictures_reach_the_batches(make, settings, vision):
    """Claim: limits of a picture's tokens, and what hides a unit and is to be predicted, are those of the stage."""

    def warmup(**changed):
        return make("warmup", changed=replace(settings, warmup=replace(settings.warmup, **changed))).next_step()[0]

    # The processor's own are 16 tokens both, and 9 to 72 are the pictures' natural sizes.
    for low, high, allowed in ((40, 400, range(40, 401)), (4, 9, range(10))):
        grids = warmup(image_size=None, min_image_tokens=low, max_image_tokens=high).grid_thw
        assert {vision.num_units(tuple(grid)) for grid in grids} <= set(allowed)
    raw, normalized = (warmup(mae_target=kind).unit_targets for kind in ("pixels", "normalized"))
    patches = normalized.reshape(-1, vision.patch_dim)
    # float32 rounding over a patch.
    assert patches.mean(1).abs().max() < 1e-5 < raw.reshape(patches.shape).mean(1).abs().max()
    for kind, hides_with_zeros in (("zero", True), ("normal", False)):
        pixels = warmup(mae_noise=kind).pixel_values
        assert bool((pixels == 0).all(1).any()) is hides_with_zeros


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


def test_packs_have_the_length_of_the_longest_within_the_budget(make, settings):
    changed = replace(settings, data=replace(settings.data, tokens_per_microbatch=128, max_length=64))
    loader = make("contrastive", changed=changed, pad_to_multiple_of=4)
    for _ in range(3):
        packs = loader.next_step()
        lengths = [sum(batch.sample_lengths) for batch in packs]
        assert {batch.num_tokens for batch in packs} == {-(-max(lengths) // 4) * 4} and len(packs) > 1
        assert max(lengths) <= 128 and len(packs) == -(-sum(lengths) // 128)
    with pytest.raises(ValueError, match="128 is not a multiple of 5"):
        make("contrastive", changed=changed, pad_to_multiple_of=5)


@pytest.fixture
def broken_folder(data_folder, tmp_path):
    shutil.copytree(data_folder, tmp_path / "pairs")
    for i in (3, 11):
        (tmp_path / "pairs" / "images" / f"{i}.png").write_bytes(b"no picture")
    return tmp_path / "pairs"


@pytest.mark.parametrize("image_size", [70, None], ids=["found-by-decoding", "found-by-the-header"])
def test_broken_pictures_are_counted_and_replaced_alike_on_every_rank(make, settings, broken_folder, image_size):
    sized = replace(settings.warmup, image_size=image_size)
    changed = replace(settings, data=replace(settings.data, path=str(broken_folder)), warmup=sized)
    single, ranks = make("warmup", changed=changed), [make("warmup", rank=r, size=2, changed=changed) for r in (0, 1)]
    pixel_free = make("warmup", changed=changed, needs_pixels=False, needs_unit_targets=False)
    seen = []
    for _ in range(3 * NUM_PICTURES // 8):
        batches = single.next_step()
        found = [batch for loader in ranks for batch in loader.next_step()]
        assert names_of(found) == names_of(batches)
        # Of 22 rows most are not in the step: a substitute is one of these.
        assert len(set(names_of(batches))) == 8
        assert [b.sample_ids for b in pixel_free.next_step()] == [b.sample_ids for b in batches]
        seen += [i for batch in batches for i in batch.sample_ids]
    assert len(seen) == 3 * NUM_PICTURES and not {"row-3", "row-11"} & set(seen)
    assert single.statistics()["skipped/unreadable_picture"] >= 6


def test_a_full_pack_whose_shortest_row_breaks_takes_the_shortest_substitute(make, settings, data_folder, tmp_path):
    """Claim: where no substitute fits, a run goes on: the pack exceeds its budget by as little as the substitutes
    allow, and its other rows are those that were planned."""
    shutil.copytree(data_folder, tmp_path / "pairs")
    rows = [json.loads(line) for line in (data_folder / "warmup.jsonl").read_text(encoding="utf-8").splitlines()]
    rows[5]["caption"] = "red"
    write_jsonl(tmp_path / "pairs" / "warmup.jsonl", rows)

    def steps_of_an_epoch(budget: int) -> tuple[list[dict[str, int]], StageLoader]:
        """Tokens of each sample of a step, in the order of the stream where one pack holds them all."""
        data = replace(settings.data, path=str(tmp_path / "pairs"), max_length=64, tokens_per_microbatch=budget)
        loader = make("warmup", changed=replace(settings, data=data))
        packs = [pack for _ in range(NUM_PICTURES // 8) for pack in loader.next_step()]
        return [dict(zip(pack.sample_ids, pack.sample_lengths)) for pack in packs], loader

    planned, _ = steps_of_an_epoch(1000)
    lengths = {name: size for step in planned for name, size in step.items()}
    number = next(i for i, step in enumerate(planned) if "row-5" in step)
    wanted = planned[number]
    assert min(lengths, key=lengths.get) == "row-5"
    budget = sum(wanted.values())
    picture = tmp_path / "pairs" / rows[5]["image_path"]
    picture.write_bytes(picture.read_bytes()[:200])
    found, loader = steps_of_an_epoch(budget)
    assert loader.statistics()["skipped/unreadable_picture"] >= 1
    drawn = loader._order.substitutes(8 * number + list(wanted).index("row-5"))
    fitting = [lengths[f"row-{row}"] for row in islice(drawn, MAX_SUBSTITUTES - 1) if row != 5]
    assert min(fitting) > wanted.pop("row-5")
    (pack,) = [step for step in found if wanted.items() <= step.items()]
    assert sum(pack.values()) == sum(wanted.values()) + min(fitting) > budget


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_without_pictures_ends_in_an_error(make, settings, broken_folder, workers):
    shutil.rmtree(broken_folder / "images")
    data = replace(settings.data, path=str(broken_folder), num_workers=workers)
    loader = make("warmup", changed=replace(settings, data=data))
    with pytest.raises(ValueError, match="rows one after the other have unusable pictures.*is not a file"):
        loader.next_step()
    loader.close()


def test_the_digest_of_a_plan_is_that_of_all_ranks_unless_one_misreads(make, settings, broken_folder):
    """Claim: ranks and worker processes that plan the same have one digest; a rank that replaces a row has another."""
    stage = replace(settings.warmup, image_size=None)
    changed = replace(settings, warmup=stage, data=replace(settings.data, path=str(broken_folder)))
    ahead = replace(changed, data=replace(changed.data, num_workers=1))
    loaders = [make("warmup", rank=r, size=2, changed=c) for r, c in ((0, changed), (1, ahead))]
    digests = []
    for _ in range(3):
        for loader in loaders:
            loader.next_step()
        digests.append([loader.plan_digest() for loader in loaders])
    assert all(0 < ours == theirs < 2**63 for ours, theirs in digests) and len({ours for ours, _ in digests}) == 3
    loaders[1].close()
    shutil.copy(broken_folder / "images" / "3.png", broken_folder / "images" / "5.png")
    misread = make("warmup", rank=1, size=2, changed=changed)
    found = [misread.next_step() and misread.plan_digest() for _ in range(3)]
    assert sum(ours != theirs for ours, (theirs, _) in zip(found, digests)) >= 1


def test_errors_of_the_worker_processes_surface(make, settings, data_folder, tmp_path):
    shutil.copytree(data_folder, tmp_path / "pairs")
    data = replace(settings.data, path=str(tmp_path / "pairs"), num_workers=1)
    loader = make("warmup", changed=replace(settings, data=data))
    shutil.rmtree(tmp_path / "pairs" / "images")
    with pytest.raises(ValueError, match="unusable pictures"):
        for _ in range(NUM_PICTURES):
            loader.next_step()
    loader.close()


@pytest.mark.parametrize("which", [0, 1])
def test_a_worker_that_was_killed_is_an_error_that_says_what_to_change(make, settings, which):
    """Claim: wherever torch reports the death, it ends in one message for users, and no other worker stays.

    Neither where the error is kept, whose traceback holds what has to do with the workers.
    """
    loader = make("warmup", changed=replace(settings, data=replace(settings.data, num_workers=1)))
    before = set(multiprocessing.active_children())
    loader.next_step()
    started = sorted(set(multiprocessing.active_children()) - before, key=lambda process: process._identity)
    message = "reads data on host .* was lost: DataLoader worker .*data.num_workers lower"
    with pytest.raises(ValueError, match=message) as lost:
        with lost_workers_explained():
            started[which].kill()
            for _ in range(NUM_PICTURES):
                loader.next_step()
    loader.close()
    for process in started:
        process.join(30)
    assert not any(process.is_alive() for process in started), lost.value


def hang_up():
    raise ConnectionResetError("by peer")


class HangsUp:
    """Fails where it arrives, as a tensor does whose worker has died since it sent it."""

    def __reduce__(self):
        return hang_up, ()


@pytest.mark.parametrize(
    "plan",
    [lambda step: os.kill(os.getpid(), signal.SIGKILL), lambda step: [HangsUp()]],
    ids=["killed", "hangs up"],
)
def test_a_worker_that_is_lost_at_once_leaves_no_other_either(plan):
    """Claim: the others also end where the stream has not begun, so that nobody can close it."""
    before = set(multiprocessing.active_children())
    planner = SimpleNamespace(shape=SimpleNamespace(global_batch_size=1, num_ranks=1), plan=plan)
    with pytest.raises(ValueError, match="was lost: DataLoader worker"):
        next(packs_from(planner, 0, num_workers=1))
    others = set(multiprocessing.active_children()) - before
    for process in others:
        process.join(30)
    assert not any(process.is_alive() for process in others)


def test_an_error_in_a_worker_is_not_taken_for_its_loss():
    """Claim: what a worker comes upon, such as a file that ends too soon, arrives as that, with its traceback."""

    def plan(step):
        raise EOFError("the file ends too soon")

    planner = SimpleNamespace(shape=SimpleNamespace(global_batch_size=1, num_ranks=1), plan=plan)
    with pytest.raises(EOFError, match="in plan\n(?s:.*)the file ends too soon"):
        next(packs_from(planner, 0, num_workers=1))


def test_too_many_broken_pictures_end_the_run(make, settings, broken_folder):
    for i in range(12, 18):
        (broken_folder / "images" / f"{i}.png").unlink()
    loader = make("warmup", changed=replace(settings, data=replace(settings.data, path=str(broken_folder))))
    with pytest.raises(ValueError, match=r"pictures could not be used for \d+ rows .*missing_picture.*at most 5%"):
        for _ in range(20):
            loader.next_step()


def test_a_state_of_another_stream_is_refused(make, settings):
    state = make("warmup").state_dict()
    with pytest.raises(ValueError, match="the saved loader state is of"):
        make("bridge").load_state_dict(state)
    with pytest.raises(ValueError, match="'num_rows': 7"):
        make("warmup").load_state_dict({**state, "num_rows": 7})
    with pytest.raises(ValueError, match="'seed': 7"):
        make("warmup").load_state_dict(make("warmup", changed=replace(settings, seed=7)).state_dict())


@pytest.mark.parametrize("stage", STAGES)
def test_other_rows_are_refused_and_a_moved_folder_is_not(make, settings, data_folder, tmp_path, stage):
    """Claim: as many rows with one other word are another stream; the same rows elsewhere are the same one."""
    state = json.loads(json.dumps(make(stage).state_dict()))
    moved = tmp_path / "elsewhere"
    shutil.copytree(data_folder, moved)
    changed = replace(settings, data=replace(settings.data, path=str(moved)))
    make(stage, changed=changed).load_state_dict(state)
    lines = (moved / f"{stage}.jsonl").read_text().splitlines()
    lines[5] = lines[5].replace('"row-5"', '"row-five"')
    (moved / f"{stage}.jsonl").write_text("\n".join(lines))
    other = make(stage, changed=changed)
    with pytest.raises(ValueError, match=f"the data of stage {stage} has changed .*as many rows.*resume with the same"):
        other.load_state_dict(state)
    # As earlier versions left it.
    other.load_state_dict({name: value for name, value in state.items() if name != "rows_digest"})


def test_a_moved_source_goes_on(make, settings, data_folder, tmp_path):
    """Claim: pictures are named by their place below the source's folder, wherever that lies."""
    shutil.copytree(data_folder, tmp_path / "elsewhere")
    loaders = [
        make("bridge", changed=replace(settings, data=DataSettings(sources=(SourceSettings("s", str(folder)),))))
        for folder in (data_folder, tmp_path / "elsewhere")
    ]
    loaders[1].load_state_dict(loaders[0].state_dict())


def test_other_weights_are_another_stream(make, settings, data_folder):
    """Claim: a mixture's state is refused under other weights, and under none, where an epoch has each row once."""

    def loader(*weights):
        sources = tuple(SourceSettings(name, str(data_folder), weight=weight) for name, weight in zip("ab", weights))
        return make("bridge", changed=replace(settings, data=DataSettings(sources=sources)))

    weighted, plain = loader(1.0, 2.0).state_dict(), loader(None, None).state_dict()
    loader(1.0, 2.0).load_state_dict(weighted)
    for state, weights in ((weighted, (None, None)), (plain, (1.0, 2.0)), (weighted, (1.0, 3.0))):
        with pytest.raises(ValueError, match="the saved loader state is of"):
            loader(*weights).load_state_dict(state)


def test_more_pairs_per_step_than_there_are_is_refused(make, settings):
    large = replace(settings.contrastive, global_batch_size=64, micro_batch_size=8)
    with pytest.raises(ValueError, match=r"has 48 pairs, contrastive.global_batch_size is 64"):
        make("contrastive", changed=replace(settings, contrastive=large))


def test_missing_paths_and_wrong_ranks_are_refused(make, settings):
    with pytest.raises(ValueError, match=r"data.path \(or data.sources\) and model.path"):
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
