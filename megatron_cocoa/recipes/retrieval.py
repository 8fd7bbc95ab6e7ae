"""Retrieval on the run's own pictures: recall between captions and pictures, and strips to look at."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_cocoa.batch import PackedBatch
from megatron_cocoa.config import EmbeddingForm, StageSettings
from megatron_cocoa.data.evaluation_batches import embedding_batch
from megatron_cocoa.data.sources import CaptionRow, Content, read_captions
from megatron_cocoa.evaluation.embed import embed
from megatron_cocoa.evaluation.metrics import evaluate_pairs, top_candidates
from megatron_cocoa.evaluation.report_data import RecallRow, RetrievalStrip, StripCandidate
from megatron_cocoa.model.build import Model
from megatron_cocoa.parallel import topology
from megatron_cocoa.recipes.context import RunContext, evaluation_parts

POOLS = {"heldout": "eval_heldout.jsonl", "training": "eval_train.jsonl"}
PICTURE = "<|image_1|>"


@dataclass(frozen=True)
class Pool:
    """Pictures and their captions, each caption the right answer for every picture that has the same one."""

    name: str
    rows: tuple[CaptionRow, ...]

    @property
    def keys(self) -> list[str]:
        """What makes two rows right for each other: their captions."""
        return [row.caption for row in self.rows]


def read_pools(context: RunContext) -> list[Pool]:
    """The evaluation pools that the data folder has."""
    folder = Path(context.settings.data.path)
    found = [(name, folder / file) for name, file in POOLS.items() if (folder / file).is_file()]
    return [Pool(name, tuple(read_captions(path).rows)) for name, path in found]


@dataclass(frozen=True)
class PoolEmbeddings:
    """float32 ``(items, hidden)`` each, rows of length one."""

    texts: Tensor
    pictures: Tensor


class RetrievalProbe:
    """Embeds the pools with a model and reports recall.

    Args:
        context: of the run.
        stage: pictures are sized as this stage sizes them, and things embedded in its form.
        batch_size: items per pack.
    """

    def __init__(self, context: RunContext, stage: StageSettings, *, batch_size: int = 64):
        self.pools = read_pools(context)
        self.batch_size = batch_size
        self._context, self._stage = context, stage
        self.form = stage.embedding_form
        self.builder, self.options = evaluation_parts(context, stage, needs_pixels=topology.is_pipeline_first_stage())

    def in_form(self, form: EmbeddingForm) -> RetrievalProbe:
        """The same for a model that embeds in another form."""
        if form == self.form:
            return self
        other = copy.copy(self)
        needs_pixels = topology.is_pipeline_first_stage()
        other.form = form
        other.builder, other.options = evaluation_parts(
            self._context, self._stage, form=form, needs_pixels=needs_pixels
        )
        return other

    def embed(self, model: Model, pool: Pool) -> PoolEmbeddings:
        """Captions and pictures of a pool, on every rank."""
        return PoolEmbeddings(
            texts=self._embed(model, [Content(row.caption, "") for row in pool.rows]),
            pictures=self._embed(model, [Content(PICTURE, row.image_path) for row in pool.rows]),
        )

    def _embed(self, model: Model, contents: list[Content]) -> Tensor:
        def make_batch(start: int, end: int) -> PackedBatch:
            return embedding_batch(contents[start:end], builder=self.builder, options=self.options, first=start)

        return embed(model, num_items=len(contents), batch_size=self.batch_size, make_batch=make_batch)

    def recall(self, model: Model, *, label: str, kind: str) -> list[RecallRow]:
        """Recall rows of every pool in both directions; the same on every rank."""
        rows = []
        for pool in self.pools:
            found = self.embed(model, pool)
            for direction, result in evaluate_pairs(found.texts, found.pictures, keys=pool.keys).items():
                rows.append(RecallRow(label, pool.name, direction, result, kind))
        return rows

    def strips(self, model: Model, folder: Path, *, per_direction: int = 5, depth: int = 5) -> list[RetrievalStrip]:
        """Queries spread over the held-out pool with their nearest candidates."""
        pool = next((p for p in self.pools if p.name == "heldout"), None)
        if pool is None:
            return []
        found, keys = self.embed(model, pool), pool.keys
        chosen = torch.linspace(0, len(pool.rows) - 1, per_direction + 2).long()[1:-1]
        strips = []
        for direction, queries, candidates in (
            ("text_to_image", found.texts, found.pictures),
            ("image_to_text", found.pictures, found.texts),
        ):
            nearest, cosines = top_candidates(queries[chosen], candidates, k=depth)
            for place, item in enumerate(chosen.tolist()):
                right = torch.tensor([key == keys[item] for key in keys])
                scores = candidates @ queries[item]
                answers = [
                    _candidate(pool.rows[c], folder, direction, float(cosine), bool(right[c]))
                    for c, cosine in zip(nearest[place].tolist(), cosines[place].tolist())
                ]
                row = pool.rows[item]
                by_text = direction == "text_to_image"
                strips.append(
                    RetrievalStrip(
                        pool="heldout",
                        direction=direction,
                        candidates=tuple(answers),
                        rank=1.0 + float((scores > scores[right].max()).sum()),
                        num_candidates=len(pool.rows),
                        query_text=row.caption if by_text else "",
                        query_png=None if by_text else (folder / row.image_path).read_bytes(),
                    )
                )
        return strips


def _candidate(row: CaptionRow, folder: Path, direction: str, cosine: float, right: bool) -> StripCandidate:
    if direction == "text_to_image":
        return StripCandidate(cosine, right, png=(folder / row.image_path).read_bytes())
    return StripCandidate(cosine, right, text=row.caption)


def recall_as_json(rows: list[RecallRow]) -> str:
    """Recall rows for machines."""
    return json.dumps(
        [
            {
                "model": row.model,
                "pool": row.pool,
                "direction": row.direction,
                "recall": {str(k): e.value for k, e in row.result.recall.items()},
                "chance": {str(k): v for k, v in row.result.chance.items()},
            }
            for row in rows
        ],
        indent=1,
    )
