"""Reading back what ``tools/embed.py`` wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cocoa.export.embed_corpus import MANIFEST, ShardPlan, contents_sha256, is_done

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


def read_shards(folder: str | Path) -> np.ndarray:
    """All vectors of a finished corpus, in the order of its rows.

    Returns:
        float32 ``(rows, hidden)``, rows of length one.

    Raises:
        ValueError: if the folder is not ``tools/embed.py``'s, a shard is missing or damaged, or a vector is not finite.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    plan = ShardPlan(folder, manifest["num_items"], manifest["shard_size"])
    unfinished = [shard for shard in range(plan.num_shards) if not is_done(plan, shard)]
    if unfinished:
        raise ValueError(
            f"{folder}: {len(unfinished)} of {plan.num_shards} shards are missing or damaged (first: {unfinished[0]}): "
            f"start tools/embed.py again with its arguments"
        )
    parts = [np.load(plan.file("embeddings", shard), allow_pickle=False) for shard in range(plan.num_shards)]
    vectors = np.concatenate(parts)
    if len(vectors) != plan.num_items or not np.isfinite(vectors).all():
        broken = int((~np.isfinite(vectors)).any(axis=1).sum())
        raise ValueError(f"{folder} has {len(vectors)} vectors for {plan.num_items} rows, {broken} of them not finite")
    return vectors


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        ShardPlan(folder, manifest["num_items"], manifest["shard_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{folder} has no readable {MANIFEST} ({error})"
        raise ValueError(f"{found}: needed an output of tools/embed.py") from error
    return manifest
