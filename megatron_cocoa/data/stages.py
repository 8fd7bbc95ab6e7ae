"""What each stage reads, how it prepares a row, and how it packs: one class per stage, one interface."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np

from megatron_cocoa.batch import MaskKind, PackedBatch
from megatron_cocoa.config import TrainSettings
from megatron_cocoa.data.collate import PackOptions, collate_bridge, collate_contrastive, collate_warmup
from megatron_cocoa.data.corruption import seeded_generator
from megatron_cocoa.data.cost import SampleSize
from megatron_cocoa.data.mixture import MixedOrder, stream_of
from megatron_cocoa.data.order import SampleOrder
from megatron_cocoa.data.prepared import CorruptionSettings, PreparedSample
from megatron_cocoa.data.rows import IMAGE_TOKEN, CaptionRow, Content, PairRow, RowSet
from megatron_cocoa.data.samples import SampleBuilder
from megatron_cocoa.data.source_list import stage_rows
from megatron_cocoa.data.source_order import SourceOrder

Order = SampleOrder | MixedOrder | SourceOrder


class StageData(Protocol):
    """One stage's rows and what becomes of them."""

    row_set: RowSet

    def order(self) -> Order:
        """Which row comes when."""

    def statistics(self) -> dict[str, int]:
        """What else there is to know of the rows, by name."""

    def measure(self, row, builder: SampleBuilder, *, epoch: int) -> list[SampleSize]:
        """The sizes of the packed samples that ``row`` will give in ``epoch``, by the pictures' headers alone."""

    def prepare(self, row, builder: SampleBuilder, *, epoch: int, step: int) -> list[PreparedSample]:
        """The packed samples that ``row`` gives, in order."""

    def collate(self, samples: list[PreparedSample], options: PackOptions) -> PackedBatch:
        """One micro-batch."""


class WarmupData:
    """Stage 1: ``warmup.jsonl``, pictures and captions, both masked."""

    def __init__(self, settings: TrainSettings) -> None:
        self.row_set = stage_rows("warmup", settings.data, seed=settings.seed)
        self.corruption = CorruptionSettings.of_warmup(settings.warmup, seed=settings.seed)

    def order(self) -> Order:
        return stream_of(self.row_set, seed=self.corruption.seed, stage="warmup")

    def statistics(self) -> dict[str, int]:
        return {}

    def measure(self, row: CaptionRow, builder: SampleBuilder, *, epoch: int) -> list[SampleSize]:
        size = builder.measure(Content(IMAGE_TOKEN + row.caption, row.image_path), with_bridge=False)
        text = size.tokens - builder.vision.num_units((1, 1, sum(size.patches)))
        return [replace(size, labels=self.corruption.text_mask_ratio * text)]

    def prepare(self, row: CaptionRow, builder: SampleBuilder, *, epoch: int, step: int) -> list[PreparedSample]:
        return [builder.warmup(row, self.corruption, epoch=epoch, step=step)]

    def collate(self, samples: list[PreparedSample], options: PackOptions) -> PackedBatch:
        return collate_warmup(samples, options)


class BridgeData:
    """Stage 2: ``bridge.jsonl``, block A seen through the bridge, block B masked."""

    def __init__(self, settings: TrainSettings) -> None:
        stage = settings.bridge
        self.row_set = stage_rows("bridge", settings.data, seed=settings.seed)
        self.mask_kind = MaskKind.of_bridge_stage(bridge_sees_target=stage.bridge_sees_target)
        self.corruption = CorruptionSettings(
            seed=settings.seed,
            text_mask_ratio=stage.target_mask_ratio,
            eligible_tokens=stage.eligible_tokens,
            unit_mask_ratio=stage.query_unit_mask_ratio,
            mask_at_least_one=stage.mask_at_least_one,
        )

    def order(self) -> Order:
        return stream_of(self.row_set, seed=self.corruption.seed, stage="bridge")

    def statistics(self) -> dict[str, int]:
        return {}

    def measure(self, row: PairRow, builder: SampleBuilder, *, epoch: int) -> list[SampleSize]:
        return [builder.measure_bridge(row.query, row.target.text, ratio=self.corruption.text_mask_ratio)]

    def prepare(self, row: PairRow, builder: SampleBuilder, *, epoch: int, step: int) -> list[PreparedSample]:
        blocks = builder.bridge_blocks(row.row_id, row.query, row.target.text, self.corruption, epoch=epoch, step=step)
        return [builder.join_blocks(blocks)]

    def collate(self, samples: list[PreparedSample], options: PackOptions) -> PackedBatch:
        return collate_bridge(samples, options, mask_kind=self.mask_kind)


class ContrastiveData:
    """Stage 3: ``contrastive.jsonl``, two samples a pair and its hard negatives, nothing masked.

    What all rows must be looked at for, ten seconds for a million, is found here, where one rank of a host does so.
    """

    def __init__(self, settings: TrainSettings) -> None:
        stage = settings.contrastive
        self.num_hard_negatives = stage.num_hard_negatives
        self.row_set = stage_rows(
            "contrastive", settings.data, seed=settings.seed, with_negatives=self.num_hard_negatives > 0
        )
        self.seed = settings.seed
        self.is_causal = stage.attention == "causal"
        self.batch_size = stage.global_batch_size
        self.per_source = stage.per_source_batches
        found = len(self.row_set.rows)
        if found < self.batch_size:
            raise ValueError(
                f"stage contrastive has {found} pairs, contrastive.global_batch_size is {self.batch_size}: a pair "
                f"that occurs twice in a step is its own negative; lower global_batch_size"
            )
        self._statistics = self._count_negatives() if self.num_hard_negatives else {}
        # A pair and the same pair turned round: in one step, the text of one is a negative for itself in the other.
        self._groups = self._of_each_row(_pair_key)
        self._sources: dict[str, int] = {}
        if self.per_source:
            self._source_of_row = self._of_each_row(
                lambda row: self._sources.setdefault(row.source, len(self._sources))
            )

    def order(self) -> Order:
        shared = dict(seed=self.seed, stage="contrastive", groups=self._groups, batch_size=self.batch_size)
        if not self.per_source:
            return stream_of(self.row_set, **shared)
        names = list(self._sources)
        return SourceOrder([names[number] for number in self._source_of_row.tolist()], **shared)

    def statistics(self) -> dict[str, int]:
        return self._statistics

    def measure(self, row: PairRow, builder: SampleBuilder, *, epoch: int) -> list[SampleSize]:
        sizes = [builder.measure(content) for content in (row.query, row.target, *self._negatives(row, epoch))]
        if not self.is_causal:
            return sizes
        return [replace(size, pairs=size.tokens * (size.tokens + 1) // 2) for size in sizes]

    def prepare(self, row: PairRow, builder: SampleBuilder, *, epoch: int, step: int) -> list[PreparedSample]:
        return builder.pair(row, self._negatives(row, epoch))

    def _of_each_row(self, number: Callable[[PairRow], int]) -> np.ndarray:
        rows = self.row_set.rows
        return np.fromiter(map(number, rows), dtype=np.int64, count=len(rows))

    def _count_negatives(self) -> dict[str, int]:
        found = self._of_each_row(lambda row: len(row.negatives))
        if not found.any():
            raise ValueError(
                f"contrastive.num_hard_negatives is {self.num_hard_negatives}, but no row of the stage has a hard "
                f"negative (columns neg_text, neg_image_path): set it to 0, or mine negatives"
            )
        return {"rows_with_fewer_hard_negatives": int((found < self.num_hard_negatives).sum())}

    def _negatives(self, row: PairRow, epoch: int) -> list[Content]:
        """At most as many as asked for: all of a row that has no more, else a draw of this epoch."""
        if len(row.negatives) <= self.num_hard_negatives:
            return list(row.negatives)
        generator = seeded_generator(self.seed, epoch, row.row_id, "negatives")
        chosen = generator.choice(len(row.negatives), size=self.num_hard_negatives, replace=False)
        return [row.negatives[index] for index in sorted(chosen)]

    def collate(self, samples: list[PreparedSample], options: PackOptions) -> PackedBatch:
        return collate_contrastive(samples, options, num_hard_negatives=self.num_hard_negatives)


def _pair_key(row: PairRow) -> int:
    """The same for a pair and the same pair turned round; a number, since millions of rows have one."""
    sides = sorted(repr(side).encode("utf-8") for side in (row.query, row.target))
    return int.from_bytes(hashlib.blake2b(b"\x1f".join(sides), digest_size=8).digest(), "little", signed=True)


STAGE_DATA: dict[str, type] = {"warmup": WarmupData, "bridge": BridgeData, "contrastive": ContrastiveData}


def stage_data(stage: str, settings: TrainSettings) -> StageData:
    """Read everything that a stage trains on; picklable.

    Raises:
        ValueError: for paths that are not set, as ``source_list.stage_rows``, or for rows that the stage cannot use.
    """
    if settings.model.path is None or (settings.data.path is None and not settings.data.sources):
        raise ValueError(
            "data.path (or data.sources) and model.path must both be set: rows come from one, sizes from the other"
        )
    return STAGE_DATA[stage](settings)
