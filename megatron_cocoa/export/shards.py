"""Reading back what ``tools/embed.py`` wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_cocoa.export.embed_corpus import MANIFEST, ShardPlan, is_done


def read_shards(folder: str | Path) -> np.ndarray:
    """All vectors of a finished corpus, in the order of its rows.

    Returns:
        float32 ``(rows, hidden)``, rows of length one.

    Raises:
        ValueError: if the folder is not ``tools/embed.py``'s, a shard is missing or damaged, or a vector is not finite.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        plan = ShardPlan(folder, manifest["num_items"], manifest["shard_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{folder} has no readable {MANIFEST} ({error})"
        raise ValueError(f"{found}: needed an output of tools/embed.py") from error
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
