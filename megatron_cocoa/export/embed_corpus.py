"""A corpus to shards of vectors and ids, on any number of ranks, continued where it was stopped.

Shard ``k`` holds rows ``[k * shard_size, (k + 1) * shard_size)`` and belongs to rank ``k % ranks``. Its files are
``embeddings-*.npy``, ``ids-*.jsonl`` in the same order, and, written last, ``shard-*.json`` with the checksums of both.
A shard counts as done when its checksums hold, whatever number of ranks wrote it. ``manifest.json`` says what the
folder is made from.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cocoa.atomic import write_atomically
from megatron_cocoa.data.checksums import sha256_of
from megatron_cocoa.export.corpus import Corpus, CorpusRow

MANIFEST = "manifest.json"
FORMAT = 1
SHARD_FILES = ("embeddings-*.npy", "ids-*.jsonl", "shard-*.json")

Encode = Callable[[Sequence[dict[str, Any]]], np.ndarray]


@dataclass(frozen=True)
class ShardPlan:
    """How a corpus is cut.

    Args:
        output: folder of the shards.
        num_items, shard_size: rows of the corpus, and of a shard (the last one has the rest).
    """

    output: Path
    num_items: int
    shard_size: int

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"shard_size is {self.shard_size}, needs 1 or more")

    @property
    def num_shards(self) -> int:
        return -(-self.num_items // self.shard_size)

    def rows(self, shard: int) -> range:
        """Rows of the corpus in ``shard``."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_items))

    def file(self, kind: str, shard: int) -> Path:
        """``kind`` is ``embeddings``, ``ids`` or ``shard``."""
        suffix = {"embeddings": "npy", "ids": "jsonl", "shard": "json"}[kind]
        return self.output / f"{kind}-{shard:05d}-of-{self.num_shards:05d}.{suffix}"


def prepare_output(plan: ShardPlan, made_from: dict[str, Any], *, overwrite: bool = False) -> None:
    """Create the folder with its manifest, or accept one that was made from the same; one rank calls it.

    Args:
        plan: of the shards.
        made_from: corpus, model and settings, as JSON values.
        overwrite: discard shards that were made from something else; a manifest without any is replaced anyway.

    Raises:
        ValueError: naming what differs, or if the folder holds something else than shards.
    """
    output, file = plan.output, plan.output / MANIFEST
    wanted = {"format": FORMAT, "num_items": plan.num_items, "shard_size": plan.shard_size} | made_from
    if output.is_dir() and any(output.iterdir()):
        if not file.is_file():
            raise ValueError(f"{output} is not empty and has no {MANIFEST}: name another output folder")
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}): name another output folder") from error
        differing = [name for name in sorted(set(wanted) | set(found)) if wanted.get(name) != found.get(name)]
        if not differing:
            return
        shards = [file for pattern in SHARD_FILES for file in output.glob(pattern)]
        if shards and not overwrite:
            name = differing[0]
            raise ValueError(
                f"{output} holds shards with another {', '.join(differing)} ({name} was {found.get(name)!r}, is now "
                f"{wanted.get(name)!r}): name another output folder, or pass --overwrite"
            )
        for old in shards:
            old.unlink()
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(wanted, indent=1, sort_keys=True) + "\n").encode())


def embed_shards(
    corpus: Corpus,
    encode: Encode,
    plan: ShardPlan,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    say: Callable[[str], None] = print,
) -> int:
    """Write this rank's shards that are not done yet.

    Args:
        corpus: what to embed.
        encode: items to float32 ``(items, hidden)``.
        plan: the same on every rank.
        rank, num_ranks: this process's place among those that hold a model.
        say: called with a line for each shard.

    Returns:
        How many shards of this rank had been done before.

    Raises:
        ValueError: if an item cannot be embedded; finished shards stay.
    """
    kept = 0
    for shard in range(rank, plan.num_shards, num_ranks):
        if is_done(plan, shard):
            kept += 1
            say(f"shard {shard + 1} of {plan.num_shards}: kept")
            continue
        rows = plan.rows(shard)
        try:
            vectors = encode([corpus.item(row) for row in rows])
        except ValueError as error:
            raise ValueError(f"in the shard that begins with row {rows[0]} (counted from 0): {error}") from error
        _write_shard(plan, shard, vectors, [corpus.rows[row] for row in rows])
        say(f"shard {shard + 1} of {plan.num_shards}: {len(rows)} vectors")
    return kept


def is_done(plan: ShardPlan, shard: int) -> bool:
    """Whether a shard's files are there with the checksums that were noted when it was finished."""
    try:
        noted = json.loads(plan.file("shard", shard).read_text(encoding="utf-8"))
        return all(noted[kind] == sha256_of(plan.file(kind, shard)) for kind in ("embeddings", "ids"))
    except (OSError, ValueError, KeyError, TypeError):
        # Missing or half written: made again.
        return False


def contents_sha256(contents: Iterable[tuple[str, str]]) -> str:
    """A hash over texts and image paths, in order: which side of which rows a shard is made from."""
    digest = hashlib.sha256()
    for text, image in contents:
        digest.update(json.dumps([text, image]).encode())
    return digest.hexdigest()


def _write_shard(plan: ShardPlan, shard: int, vectors: np.ndarray, rows: list[CorpusRow]) -> None:
    stream = io.BytesIO()
    np.save(stream, vectors, allow_pickle=False)
    lines = "".join(json.dumps({"id": row.row_id}, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(plan.file("embeddings", shard), stream.getvalue())
    write_atomically(plan.file("ids", shard), lines.encode())
    noted = {kind: sha256_of(plan.file(kind, shard)) for kind in ("embeddings", "ids")}
    noted |= {"first_row": plan.rows(shard)[0], "num_rows": len(rows)}
    noted["contents"] = contents_sha256((row.text, row.image) for row in rows)
    write_atomically(plan.file("shard", shard), (json.dumps(noted, indent=1) + "\n").encode())
