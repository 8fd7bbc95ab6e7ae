"""Reading back what ``tools/embed.py`` wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cocoa.export.embed_corpus import MANIFEST, ShardPlan, contents_sha256, is_done

_ROWS_CHECKED = 1024
_MODEL_KEYS = ("model", "model_files", "model_path")


def check_same_model(first: str | Path, second: str | Path) -> None:
    """Refuse vectors of two models: their cosines say nothing, and no later step would notice.

    Raises:
        ValueError: naming both, if the two manifests name other models or files, or one cannot be read.
    """
    made_from = [_manifest(Path(folder)) for folder in (first, second)]
    differing = [name for name in _MODEL_KEYS if made_from[0].get(name) != made_from[1].get(name)]
    if differing:
        models = " and ".join(f"{folder} by {made.get('model')}" for folder, made in zip((first, second), made_from))
        raise ValueError(f"{models} were embedded with another {', '.join(differing)}: embed both with one model")


def check_contents(folder: str | Path, contents: Sequence[tuple[str, str]], *, name: str) -> None:
    """Refuse vectors that were made from something else than what they are taken for.

    Args:
        folder: an output of ``tools/embed.py``; shards from before their contents were noted pass.
        contents: text and image path of each row, empty for none.
        name: what they are, for the message.

    Raises:
        ValueError: naming the rows of the first shard with other contents.
    """
    manifest = _manifest(Path(folder))
    plan = ShardPlan(Path(folder), manifest["num_items"], manifest["shard_size"])
    if plan.num_items != len(contents):
        raise ValueError(f"{folder} has vectors of {plan.num_items} rows for {len(contents)} {name}")
    for shard in range(plan.num_shards):
        try:
            noted = json.loads(plan.file("shard", shard).read_text(encoding="utf-8")).get("contents")
        except (OSError, ValueError, AttributeError):
            # Missing or damaged: ``read_shards`` says so.
            continue
        rows = plan.rows(shard)
        if noted not in (None, contents_sha256(contents[row] for row in rows)):
            raise ValueError(
                f"{folder} was not made from the {name}: the texts or image paths of rows {rows[0]} to {rows[-1]} are "
                f"others; embed the very same file, and do not exchange the sides"
            )


class ShardedVectors:
    """Vectors on a disk, in the order of the corpus's rows; memory holds those that are asked for, and no others.

    Args:
        folder: a finished output of ``tools/embed.py``.

    Raises:
        ValueError: if the folder is not ``tools/embed.py``'s, a shard is missing or damaged, or a vector is not finite.
    """

    def __init__(self, folder: str | Path) -> None:
        manifest = _manifest(Path(folder))
        self._plan = plan = ShardPlan(Path(folder), manifest["num_items"], manifest["shard_size"])
        unfinished = [shard for shard in range(plan.num_shards) if not is_done(plan, shard)]
        if unfinished:
            raise ValueError(
                f"{folder}: {len(unfinished)} of {plan.num_shards} shards are missing or damaged (first: "
                f"{unfinished[0]}): start tools/embed.py again with its arguments"
            )
        num_rows, num_broken, lengths = 0, 0, set()
        for shard in range(plan.num_shards):
            vectors = self._mapped(shard)
            num_rows, lengths = num_rows + len(vectors), lengths | {vectors.shape[1]}
            for start in range(0, len(vectors), _ROWS_CHECKED):
                num_broken += int((~np.isfinite(vectors[start : start + _ROWS_CHECKED])).any(axis=1).sum())
        if num_rows != plan.num_items or num_broken or len(lengths) != 1:
            raise ValueError(
                f"{folder} has {num_rows} vectors for {plan.num_items} rows, {num_broken} of them not finite, of "
                f"length {', '.join(map(str, sorted(lengths)))}"
            )
        self.shape = (num_rows, lengths.pop())

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """float32 ``(rows, hidden)``, a copy, for a slice or int64 row numbers in any order."""
        wanted = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        found = np.empty((len(wanted), self.shape[1]), dtype=np.float32)
        shards = wanted // self._plan.shard_size
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            picked = wanted[here] - shard * self._plan.shard_size
            if isinstance(rows, slice) and rows.step in (None, 1):
                # A slice is copied straight to its place, row numbers only by way of another copy.
                found[here[0] : here[-1] + 1] = self._mapped(shard)[picked[0] : picked[-1] + 1]
            else:
                found[here] = self._mapped(shard)[picked]
        return found

    def _mapped(self, shard: int) -> np.ndarray:
        """Mapped anew each time: pages of a mapping count as this process's memory for as long as it lives."""
        return np.load(self._plan.file("embeddings", shard), mmap_mode="r", allow_pickle=False)


def read_shards(folder: str | Path) -> np.ndarray:
    """All vectors of a finished corpus at once; see ``ShardedVectors``.

    Returns:
        float32 ``(rows, hidden)``, rows of length one.
    """
    return ShardedVectors(folder)[:]


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        ShardPlan(folder, manifest["num_items"], manifest["shard_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{folder} has no readable {MANIFEST} ({error})"
        raise ValueError(f"{found}: needed an output of tools/embed.py") from error
    return manifest
