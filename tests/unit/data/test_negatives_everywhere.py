"""Hard negatives and the names of sources go through every reader, the plan by cost, and the preparation of files."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from megatron_cocoa.config import ContrastiveSettings, DataSettings, SourceSettings, TrainSettings
from megatron_cocoa.data.loader import StageLoader
from megatron_cocoa.data.prepare import Preparation, prepare
from megatron_cocoa.data.row_parsing import checked_negatives
from megatron_cocoa.data.source_list import source_rows, stage_rows
from tests.unit.data.rows import pair, write_jsonl
from tests.unit.data.test_readers import save_dataset

NUM_ROWS = 16


def texts_of(i: int) -> list[str]:
    return [f"<|image_1|> negative {k}" if k % 2 else f"text {k} of {i}" for k in range(i % 4)]


def pictures_of(i: int) -> list[str]:
    return [f"images/{(i + k) % 24}.png" if k % 2 else "" for k in range(i % 4)]


def raw_rows() -> list[dict]:
    """Row i has a picture, a text, and i % 4 hard negatives, of which each second one shows a picture."""
    columns = [
        dict(qry="<|image_1|> what", qry_image_path=f"images/{i}.png", pos_text="red cat " * (1 + i % 5))
        for i in range(NUM_ROWS)
    ]
    return [
        pair(f"row-{i}", **own) | {"neg_text": texts_of(i), "neg_image_path": pictures_of(i)}
        for i, own in enumerate(columns)
    ]


def write_jsonl_source(folder, data_folder) -> SourceSettings:
    return SourceSettings("s", str(write_jsonl(folder / "rows.jsonl", raw_rows())), image_root=str(data_folder))


def write_mmeb_source(folder, data_folder) -> SourceSettings:
    (folder / "Sub").mkdir()
    pq.write_table(pa.Table.from_pylist(raw_rows()), folder / "Sub" / "train-00000-of-00001.parquet")
    return SourceSettings("s", str(folder / "Sub"), "mmeb-train", image_root=str(data_folder))


def write_saved_source(folder, data_folder) -> SourceSettings:
    """Negatives' pictures lie in cells of lists; an entry without one has neither bytes nor path."""
    rows = raw_rows()
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    cells = [
        [{"bytes": (data_folder / path).read_bytes() if path else None, "path": None} for path in row["neg_image_path"]]
        for row in rows
    ]
    table = pa.Table.from_pylist([{k: v for k, v in row.items() if k != "neg_image_path"} for row in rows])
    save_dataset(folder / "set", table.append_column("neg_image_path", pa.array(cells, type=kind)))
    return SourceSettings("s", str(folder / "set"), "hf-datasets", image_root=str(data_folder))


def write_shards_source(folder, data_folder) -> SourceSettings:
    with tarfile.open(folder / "0.tar", "w") as archive:
        for i, row in enumerate(raw_rows()):
            members = {"q.png": (data_folder / row["qry_image_path"]).read_bytes()}
            for k, path in enumerate(row["neg_image_path"]):
                members |= {f"{k}.png": (data_folder / path).read_bytes()} if path else {}
            named = [f"{k}.png" if path else "" for k, path in enumerate(row["neg_image_path"])]
            columns = {k: v for k, v in row.items() if k != "id"} | {"qry_image_path": "q.png", "neg_image_path": named}
            members["json"] = json.dumps(columns).encode()
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{i:04}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return SourceSettings("s", str(folder), "webdataset")


WRITERS = (write_jsonl_source, write_mmeb_source, write_saved_source, write_shards_source)


@pytest.fixture
def make(settings, bundle, architecture):
    def build(data, *, rank=0, size=1, **contrastive):
        changed = replace(settings, data=data, contrastive=replace(settings.contrastive, **contrastive))
        place = dict(data_parallel_rank=rank, data_parallel_size=size)
        return StageLoader("contrastive", changed, bundle=bundle, architecture=architecture, **place)

    return build


def pairs_of(batches) -> dict[tuple, tuple]:
    """By a query's tokens: keys of its target and its negatives, and the tokens behind each of these rows."""
    found = {}
    for batch in batches:
        starts = np.cumsum((0, *batch.sample_lengths)).tolist()
        tokens = [tuple(batch.input_ids[a:b].tolist()) for a, b in zip(starts, starts[1:])]
        names = [name.partition("#")[0] for name in batch.sample_ids]
        rows = zip(batch.query_rows.tolist(), batch.target_rows.tolist(), batch.negative_rows.tolist())
        for number, (query, target, negatives) in enumerate(rows):
            present = [row for row in negatives if row >= 0]
            assert {names[row] for row in (query, target, *present)} == {names[query]}
            # The order of rows in a file is their name's number in every format.
            own = (tokens[target], int(batch.target_keys[number]), tuple(tokens[row] for row in present))
            keys = tuple(batch.negative_keys[number].tolist())
            found[names[query], tokens[query]] = (*own, keys)
    return found


def without_names(found: dict[tuple, tuple]) -> list[tuple]:
    return sorted((query, *own) for (_, query), own in found.items())


@pytest.mark.parametrize("writer", WRITERS)
def test_every_format_gives_the_same_negatives(make, data_folder, tmp_path, writer):
    """Claim: texts and pictures of hard negatives are the same tokens and pixels (keys) from every format."""
    for name in ("reference", "source"):
        (tmp_path / name).mkdir()
    sources = [write_jsonl_source(tmp_path / "reference", data_folder), writer(tmp_path / "source", data_folder)]
    steps = [make(DataSettings(sources=(source,)), num_hard_negatives=3) for source in sources]
    expected, found = (without_names(pairs_of(loader.next_step() + loader.next_step())) for loader in steps)
    assert len(found) == NUM_ROWS and found == expected
    assert sorted(len(own[3]) for own in found) == sorted(i % 4 for i in range(NUM_ROWS))


@pytest.mark.parametrize("budget", [None, 256])
def test_pairs_keep_their_negatives_wherever_cost_puts_them(make, data_folder, tmp_path, budget):
    """Claim: at 1, 2 and 4 ranks a step holds the same pairs, each with its own target, negatives and keys; ranks hold
    equally many, and no pack bursts its budget, which pairs fill with their negatives."""
    source = write_jsonl_source(tmp_path, data_folder)
    data = DataSettings(sources=(source,), tokens_per_microbatch=budget, max_length=64)
    options = dict(num_hard_negatives=2, image_size=None)
    loaders = {size: [make(data, rank=r, size=size, **options) for r in range(size)] for size in (1, 2, 4)}
    for _ in range(4):
        steps = {size: [loader.next_step() for loader in group] for size, group in loaders.items()}
        expected = pairs_of(steps[1][0])
        assert len(expected) == 8
        for size, ranks in steps.items():
            assert {sum(len(batch.query_rows) for batch in own) for own in ranks} == {8 // size}
            assert pairs_of([batch for own in ranks for batch in own]) == expected
            assert budget is None or all(batch.num_tokens <= budget for own in ranks for batch in own)
            assert budget is None or all(len({batch.num_tokens for batch in own}) == 1 for own in ranks)


def test_the_plan_counts_the_negatives_that_an_epoch_draws(make, data_folder, tmp_path):
    """Claim: planned tokens are the packed ones in every epoch, and a row with more negatives costs more."""
    data = DataSettings(sources=(write_jsonl_source(tmp_path, data_folder),))
    planner = make(data, num_hard_negatives=2)._planner
    for step in range(0, 48, 8):
        for plan in planner.plan(step):
            batch, _ = planner.execute(plan)
            assert sum(batch.sample_lengths) == sum(row.tokens for row in plan.rows)
    rows = [row for plan in planner.plan(0) + planner.plan(8) for row in plan.rows]
    plain = make(data)._planner
    costs = {row.row: row.cost for plan in plain.plan(0) + plain.plan(8) for row in plan.rows}
    assert all((row.cost > costs[row.row]) == bool(row.row % 4) for row in rows)


def test_the_name_of_a_source_is_its_rows_source_unless_they_have_one(make, data_folder, tmp_path):
    """Claim: per-source batches need no column where data.sources names the sources; a column wins."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    sources = tuple(replace(write_jsonl_source(tmp_path / name, data_folder), name=name) for name in ("a", "b"))
    loader = make(DataSettings(sources=sources), per_source_batches=True)
    for _ in range(4):
        step = [name for batch in loader.next_step() for name in batch.sample_ids]
        assert len({name.split("/")[0] for name in step}) == 1
    report = loader.statistics()
    assert report["source/a"] == report["source/b"] == 16 and report["left_out_per_epoch"] == 0
    assert {"sources", "per_source_batch_size"} <= set(loader.state_dict())
    named = write_jsonl(tmp_path / "named.jsonl", [row | {"source": "own"} for row in raw_rows()])
    found = source_rows(SourceSettings("a", str(named), image_root=str(data_folder)), "contrastive", seed=0)
    assert {row.source for row in found.rows} == {"own"}


def test_per_source_batches_refuse_weights():
    """Claim: weights would have no effect, and are refused before anything is read; other stages may have them."""
    weighted = (SourceSettings("a", "a", weight=2.0), SourceSettings("b", "b", weight=1.0))
    with pytest.raises(ValueError, match=r"weights of data.sources \['a', 'b'\] would have no effect: leave"):
        TrainSettings(data=DataSettings(sources=weighted), contrastive=ContrastiveSettings(per_source_batches=True))
    others = tuple(replace(source, stages=("warmup",)) for source in weighted)
    TrainSettings(data=DataSettings(sources=others), contrastive=ContrastiveSettings(per_source_batches=True))


@pytest.mark.parametrize("writer", WRITERS)
def test_prepared_files_keep_negatives(make, data_folder, tmp_path, writer):
    """Claim: preparing loses no negative and changes none, copies their pictures, and leaves them out when told to."""
    (tmp_path / "raw").mkdir()
    source = writer(tmp_path / "raw", data_folder)
    prepare(Preparation("contrastive", (source,), tmp_path / "out", copy_pictures=True), progress=False)
    both = [DataSettings(sources=(source,)), DataSettings(path=str(tmp_path / "out"))]
    loaders = [make(data, num_hard_negatives=3) for data in both]
    expected, found = (without_names(pairs_of(loader.next_step() + loader.next_step())) for loader in loaders)
    assert len(found) == NUM_ROWS and found == expected
    prepare(Preparation("contrastive", (source,), tmp_path / "bare", with_negatives=False), progress=False)
    bare = stage_rows("contrastive", DataSettings(path=str(tmp_path / "bare")), seed=0, with_negatives=True)
    assert len(bare.rows) == NUM_ROWS and not any(row.negatives for row in bare.rows)
    assert {row.source for row in bare.rows} == {"s"}


@pytest.mark.parametrize(
    ("texts", "images", "reason"),
    [
        (["a", "b"], ["x.png"], "neg_columns_differ_in_length"),
        ([1], None, "neg_text_not_text"),
        (None, {"path": "x.png"}, "neg_image_path_not_text"),
        ("\ud800", None, "neg_text_not_unicode"),
        ("<|image_1|><|image_1|>", "x.png", "neg_several_placeholders"),
    ],
)
def test_malformed_negatives_say_why(texts, images, reason):
    with pytest.raises(ValueError, match=f"^{reason}$"):
        checked_negatives(texts, images)


def test_deferred_floats_cross_processes_as_bytes(make, data_folder, tmp_path):
    """Claim: a pack without noise crosses at an eighth of its floats' bytes (and small change), and loses nothing."""
    source = write_jsonl_source(tmp_path, data_folder)
    batches = make(DataSettings(sources=(source,)), image_size=112, num_hard_negatives=2).next_step()
    deferred = next(batch.deferred for batch in batches if batch.deferred is not None and batch.grid_thw)
    sent = pickle.dumps(deferred)
    made, again = deferred()["pixel_values"], pickle.loads(sent)()["pixel_values"]
    assert torch.equal(made, again)
    assert deferred.pictures.nbytes == deferred.picture_bytes == made.nbytes // 8
    # The table of levels takes 3 KB, names and sizes less than 2.
    assert len(sent) < made.nbytes / 8 + 5_000
