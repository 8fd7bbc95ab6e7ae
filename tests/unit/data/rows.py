"""Rows of data files, written for tests."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

from megatron_cocoa.batch import PackedBatch
from megatron_cocoa.data.readers import jsonl_records
from megatron_cocoa.data.rows import RowSet
from megatron_cocoa.data.sources import bridge_pairs_from, pairs_from, read_rows

NUM_PICTURES = 24
"""Pictures of the ``data_folder`` fixture."""


def pair(row_id: str, **columns: str) -> dict:
    return {"id": row_id, "qry": "", "qry_image_path": "", "pos_text": "", "pos_image_path": ""} | columns


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def read_pairs(path: Path, *, with_negatives: bool = False) -> RowSet:
    """The rows of stage ``contrastive`` in a JSONL file."""
    return read_rows(functools.partial(pairs_from, with_negatives=with_negatives), jsonl_records(path), str(path))


def read_bridge_pairs(path: Path) -> RowSet:
    """The rows of stage ``bridge`` in a JSONL file."""
    return read_rows(bridge_pairs_from, jsonl_records(path), str(path))


def by_sample(batches: list[PackedBatch], *, merge: int = 2) -> dict[str, tuple]:
    """What each sample holds, by its name, wherever in whichever pack it lies; names must not occur twice."""
    found: dict[str, tuple] = {}
    for batch in (batch.materialized() for batch in batches):
        start, patches, grids = 0, 0, list(batch.grid_thw)
        for name, length in zip(batch.sample_ids, batch.sample_lengths):
            assert name not in found, name
            rows = slice(start, start + length)
            own_units = _inside(batch.feature_positions, start, length)
            own: list = [batch.input_ids[rows], batch.position_ids[:, rows]]
            own.append(_shifted(batch.feature_positions, own_units, start))
            size = own_units.numel() * merge**2
            if batch.pixel_values is not None:
                own.append(batch.pixel_values[patches : patches + size])
            left, sizes = size, []
            while left:
                sizes.append(grids.pop(0))
                left -= sizes[-1][0] * sizes[-1][1] * sizes[-1][2]
            for positions, values in (("text_positions", "text_labels"), ("unit_positions", "unit_targets")):
                at = getattr(batch, positions)
                which = _inside(at, start, length)
                own.append(_shifted(at, which, start))
                own.append(None if at is None else getattr(batch, values)[which])
            found[name] = (tuple(sizes), *own)
            start, patches = start + length, patches + size
        assert not grids and (batch.pixel_values is None or patches == batch.pixel_values.shape[0])
    return found


def _inside(positions: torch.Tensor | None, start: int, length: int) -> torch.Tensor:
    if positions is None:
        return torch.zeros(0, dtype=torch.int64)
    return ((positions >= start) & (positions < start + length)).nonzero().flatten()


def _shifted(positions: torch.Tensor | None, which: torch.Tensor, start: int) -> torch.Tensor | None:
    return None if positions is None else positions[which] - start


def equal_samples(a: dict[str, tuple], b: dict[str, tuple]) -> bool:
    """Whether two results of ``by_sample`` hold the same samples, bit for bit."""
    return a.keys() == b.keys() and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else _same_or_empty(x, y)
        for name in a
        for x, y in zip(a[name], b[name])
    )


def _same_or_empty(x, y) -> bool:
    # A pack without any picture has None where another has no rows for the sample.
    empty = [value is None or (isinstance(value, torch.Tensor) and not value.numel()) for value in (x, y)]
    return all(empty) or (not any(empty) and x == y)
