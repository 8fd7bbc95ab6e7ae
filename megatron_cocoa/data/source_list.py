"""The rows of a stage: from one data folder, or from several sources of any format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_cocoa.config import DataSettings, SourceSettings
from megatron_cocoa.data.corruption import seeded_generator
from megatron_cocoa.data.mmeb_train import SPLITS
from megatron_cocoa.data.readers import Record, jsonl_records, parquet_records, saved_dataset_records
from megatron_cocoa.data.row_store import RowStore
from megatron_cocoa.data.rows import RowSet
from megatron_cocoa.data.sources import OnDrop, Parser, Tally, bridge_pairs_from, captions_from, pairs_from, read_rows
from megatron_cocoa.data.stored import StoredPicture
from megatron_cocoa.data.webdataset import shard_records

_PARSERS: dict[str, Parser] = {
    "warmup": captions_from,
    "bridge": bridge_pairs_from,
    "contrastive": pairs_from,
}

_PATH_COLUMNS = ("image_path", "qry_image_path", "pos_image_path", "neg_image_path")
_MMEB_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")


def stage_rows(stage: str, data: DataSettings, *, seed: int, with_negatives: bool = False) -> RowSet:
    """Everything that ``stage`` trains on.

    Args:
        stage: ``warmup``, ``bridge`` or ``contrastive``.
        data: its ``sources``, or where there are none ``<stage>.jsonl`` of its ``path``.
        seed: draws the rows of a source with ``max_rows``.
        with_negatives: in stage ``contrastive``, also read hard negatives.

    Raises:
        ValueError: for files that are missing, cut short or of another form, too many malformed rows, or no row left.
    """
    if not data.sources:
        path = Path(data.path) / f"{stage}.jsonl"
        return read_rows(_parser(stage, with_negatives), jsonl_records(path), str(path))
    sources = [source for source in data.sources if stage in source.stages]
    if not sources:
        raise ValueError(f"none of data.sources feeds stage {stage}: add it to the `stages` of one, or leave it out")
    # One store for all: rows may be gigabytes, and would else be there twice when they are joined.
    rows, flipped = RowStore(), 0
    dropped: dict[str, int] = {}
    parts: list[tuple[str, int, float | None]] = []
    for source in sources:
        before = len(rows)
        found = source_rows(source, stage, seed=seed, with_negatives=with_negatives, rows=rows)
        parts.append((source.name, len(rows) - before, source.weight))
        dropped |= {f"{source.name}/{reason}": number for reason, number in found.dropped.items()}
        flipped += found.flipped
    return RowSet(rows, dropped, flipped, tuple(parts))


def _parser(stage: str, with_negatives: bool) -> Parser:
    parser = _PARSERS[stage]
    return partial(parser, with_negatives=True) if with_negatives and stage == "contrastive" else parser


def source_rows(
    source: SourceSettings,
    stage: str,
    *,
    seed: int,
    with_negatives: bool = False,
    on_drop: OnDrop | None = None,
    rows: RowStore | None = None,
) -> RowSet:
    """The rows of one source for ``stage``; row names begin with the source's, and ``source`` is its name by default.

    Args:
        source: where they come from.
        stage: whose rules apply.
        seed: draws ``max_rows``.
        with_negatives: as in ``stage_rows``.
        on_drop: called with the name of each row that is left out for what it is, and the reason.
        rows: a store to add them to, which the result then holds; None begins one.

    Raises:
        ValueError: as ``stage_rows``.
    """

    def dropped(row_id: str, reason: str) -> None:
        if on_drop is not None:
            on_drop(f"{source.name}/{row_id}", reason)

    tally = Tally(dropped)
    parsed = _parser(stage, with_negatives)(
        source_records(source, stage), f"source {source.name} ({source.path})", tally
    )
    named = (replace(row, row_id=f"{source.name}/{row.row_id}", source=row.source or source.name) for row in parsed)
    rows = RowStore() if rows is None else rows
    if source.max_rows is None:
        rows.extend(named)
        return RowSet(rows, dict(tally.dropped), tally.flipped)
    found = RowStore(named)
    drawn = range(len(found))
    if len(found) > source.max_rows:
        drawn = seeded_generator(seed, stage, source.name, "max_rows").permutation(len(found))[: source.max_rows]
        tally.dropped["over_max_rows"] = len(found) - source.max_rows
    rows.extend(found[place] for place in sorted(drawn))
    return RowSet(rows, dict(tally.dropped), tally.flipped)


def source_records(source: SourceSettings, stage: str) -> Iterator[Record]:
    """Records of one source, under our column names, with image paths bound to their folder.

    Raises:
        ValueError: while reading, as ``stage_rows``.
    """
    path = Path(source.path)
    renamed = {theirs: ours for ours, theirs in source.columns.items()}
    root, records = _OPENERS[source.format](source, path, stage)
    root = source.image_root or str(root)
    for name, record in records:
        if isinstance(record, dict):
            record = {column: value for column, value in record.items() if column not in source.columns} | {
                renamed[column]: value for column, value in record.items() if column in renamed
            }
            for column in _PATH_COLUMNS:
                if column in record:
                    record[column] = _rooted(record[column], root)
        yield name, record


def _rooted(value: object, root: str) -> object:
    if isinstance(value, (list, tuple)):
        return [_rooted(item, root) for item in value]
    return StoredPicture(root, value) if isinstance(value, str) and value else value


def _open_jsonl(source: SourceSettings, path: Path, stage: str) -> tuple[Path, Iterator[Record]]:
    file = path / f"{stage}.jsonl" if path.is_dir() else path
    return file.parent, jsonl_records(file)


def _open_mmeb_train(source: SourceSettings, path: Path, stage: str) -> tuple[Path, Iterator[Record]]:
    by_split = {split: sorted(path.glob(f"{split}-*.parquet")) for split in SPLITS}
    present = [split for split, files in by_split.items() if files]
    split = source.split or (present[0] if len(present) == 1 else None)
    if split not in present:
        raise ValueError(
            f"source {source.name}: {path} holds parquet files of the splits {present or 'none'}, `split` is "
            f"{source.split!r}: name one of {', '.join(present or SPLITS)} (the folder of one subset is needed)"
        )
    needed = [source.columns.get(column, column) for column in _MMEB_COLUMNS]
    return path.parent, parquet_records(by_split[split], needed=needed)


def _open_saved(source: SourceSettings, path: Path, stage: str) -> tuple[Path, Iterator[Record]]:
    return path, saved_dataset_records(path, split=source.split)


def _open_shards(source: SourceSettings, path: Path, stage: str) -> tuple[Path, Iterator[Record]]:
    return path, shard_records(path, source.columns)


_OPENERS = {
    "jsonl": _open_jsonl,
    "mmeb-train": _open_mmeb_train,
    "hf-datasets": _open_saved,
    "webdataset": _open_shards,
}
