"""Retrieval on the run's own pictures: recall between captions and pictures, and examples to look at."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_cocoa.batch import PackedBatch
from megatron_cocoa.config import EmbeddingForm, StageSettings
from megatron_cocoa.data.decode import read_picture
from megatron_cocoa.data.evaluation_batches import embedding_batch
from megatron_cocoa.data.rows import IMAGE_TOKEN, CaptionRow, Content
from megatron_cocoa.data.sources import read_captions
from megatron_cocoa.data.stored import open_picture
from megatron_cocoa.evaluation.embed import embed
from megatron_cocoa.evaluation.embedding_map import EmbeddingMap, principal_axes
from megatron_cocoa.evaluation.metrics import evaluate_pairs
from megatron_cocoa.evaluation.pictures import thumbnail_png
from megatron_cocoa.evaluation.report_data import POOL_NAMES, RecallRow, RetrievalStrip
from megatron_cocoa.model.build import Model
from megatron_cocoa.parallel import topology
from megatron_cocoa.recipes.context import RunContext, evaluation_parts, pool_files
from megatron_cocoa.recipes.retrieval_examples import pool_examples


@dataclass(frozen=True)
class Pool:
    """Pictures and their captions; every picture with the same caption is a right answer for it."""

    name: str
    rows: tuple[CaptionRow, ...]

    @property
    def keys(self) -> list[str]:
        """Rows with equal keys are right answers for each other: their captions."""
        return [row.caption for row in self.rows]


def read_pools(context: RunContext) -> list[Pool]:
    """The evaluation pools that the data folder has."""
    files = pool_files(context.settings.data.path)
    return [Pool(name, tuple(read_captions(path).rows)) for name, path in files.items()]


@dataclass(frozen=True)
class PoolEmbeddings:
    """float32 ``(items, hidden)`` each, rows of length one."""

    texts: Tensor
    pictures: Tensor


class RetrievalProbe:
    """Embeds the pools with a model and reports recall.

    Args:
        context: of the run.
        stage: pictures are sized as this stage sizes them, and inputs laid out in the form it embeds in.
        batch_size: items per pack.
    """

    def __init__(self, context: RunContext, stage: StageSettings, *, batch_size: int = 64):
        self.pools = read_pools(context)
        self.folder = Path(context.settings.data.path or ".").resolve()
        self.batch_size = batch_size
        self._context, self._stage = context, stage
        self._set_form(stage.embedding_form)

    def in_form(self, form: EmbeddingForm) -> RetrievalProbe:
        """The same probe for a model that embeds in another form."""
        if form == self.form:
            return self
        other = copy.copy(self)
        other._set_form(form)
        return other

    def _set_form(self, form: EmbeddingForm) -> None:
        needs_pixels = topology.is_pipeline_first_stage()
        parts = evaluation_parts(self._context, self._stage, form=form, needs_pixels=needs_pixels)
        self.form, (self.builder, self.options) = form, parts

    def embed(self, model: Model, pool: Pool) -> PoolEmbeddings:
        """Captions and pictures of a pool, on every rank."""
        return PoolEmbeddings(
            texts=self._embed(model, [Content(row.caption, "") for row in pool.rows]),
            pictures=self._embed(model, [Content(IMAGE_TOKEN, row.image_path) for row in pool.rows]),
        )

    def _embed(self, model: Model, contents: list[Content]) -> Tensor:
        def make_batch(start: int, end: int) -> PackedBatch:
            return embedding_batch(contents[start:end], builder=self.builder, options=self.options, first=start)

        return embed(model, num_items=len(contents), batch_size=self.batch_size, make_batch=make_batch)

    def embed_pools(self, model: Model) -> list[PoolEmbeddings]:
        """What ``recall`` and ``examples`` look at, in the order of the pools."""
        return [self.embed(model, pool) for pool in self.pools]

    def recall(self, embeddings: list[PoolEmbeddings], *, label: str, kind: str) -> list[RecallRow]:
        """Recall rows of every pool in both directions; the same on every rank."""
        rows = []
        for pool, found in zip(self.pools, embeddings):
            for direction, result in evaluate_pairs(found.texts, found.pictures, keys=pool.keys).items():
                rows.append(RecallRow(label, pool.name, direction, result, kind))
        return rows

    def examples(self, embeddings: list[PoolEmbeddings]) -> tuple[list[RetrievalStrip], dict[str, EmbeddingMap]]:
        """Hits, misses and worst queries of the held-out pool, and the map of each pool; the same on every rank."""
        strips: list[RetrievalStrip] = []
        maps: dict[str, EmbeddingMap] = {}
        for pool, found in zip(self.pools, embeddings):
            maps[POOL_NAMES[pool.name]] = principal_axes(found.texts.numpy(), found.pictures.numpy())
            if pool.name == "heldout":
                strips = pool_examples(pool.rows, found.texts, found.pictures, thumbnail=self._thumbnail)
        return strips, maps

    def _thumbnail(self, row: CaptionRow) -> bytes:
        return thumbnail_png(read_picture(open_picture(row.image_path, self.folder), name=str(row.image_path)))


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
