"""What each stage reads, how it prepares a row, and how it packs: one class per stage, one interface."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Protocol

from megatron_cocoa.batch import MaskKind, PackedBatch
from megatron_cocoa.config import TrainSettings
from megatron_cocoa.data.collate import PackOptions, collate_bridge, collate_contrastive, collate_warmup
from megatron_cocoa.data.cost import SampleSize
from megatron_cocoa.data.prepared import CorruptionSettings, PreparedSample
from megatron_cocoa.data.samples import SampleBuilder
from megatron_cocoa.data.source_list import stage_rows
from megatron_cocoa.data.sources import IMAGE_TOKEN, CaptionRow, Content, PairRow, RowSet


class StageData(Protocol):
    """One stage's rows and what becomes of them."""

    row_set: RowSet

    def groups(self) -> list[Hashable] | None:
        """A key per row; rows with equal keys should not meet in one step. None where it does not matter."""

    def measure(self, row, builder: SampleBuilder) -> list[SampleSize]:
        """The sizes of the packed samples that ``row`` will give, by the pictures' headers alone."""

    def prepare(self, row, builder: SampleBuilder, *, epoch: int, step: int) -> list[PreparedSample]:
        """The packed samples that ``row`` gives, in order."""

    def collate(self, samples: list[PreparedSample], options: PackOptions) -> PackedBatch:
        """One micro-batch."""


class WarmupData:
    """Stage 1: ``warmup.jsonl``, pictures and captions, both masked."""

    def __init__(self, settings: TrainSettings) -> None:
        stage = settings.warmup
        self.row_set = stage_rows("warmup", settings.data, seed=settings.seed)
        self.corruption = CorruptionSettings(
            seed=settings.seed,
            text_mask_ratio=stage.text_mask_ratio,
            unit_mask_ratio=stage.unit_mask_ratio,
            mask_at_least_one=stage.mask_at_least_one,
            mae_noise=stage.mae_noise,
        )

    def groups(self) -> None:
        return None

    def measure(self, row: CaptionRow, builder: SampleBuilder) -> list[SampleSize]:
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
        self.mask_kind = MaskKind.EOS_BRIDGED if stage.bridge_sees_target else MaskKind.EOS_BRIDGED_STRICT
        self.corruption = CorruptionSettings(
            seed=settings.seed,
            text_mask_ratio=stage.target_mask_ratio,
            unit_mask_ratio=stage.query_unit_mask_ratio,
            mask_at_least_one=stage.mask_at_least_one,
        )

    def groups(self) -> None:
        return None

    def measure(self, row: PairRow, builder: SampleBuilder) -> list[SampleSize]:
        return [builder.measure_bridge(row.query, row.target.text, ratio=self.corruption.text_mask_ratio)]

    def prepare(self, row: PairRow, builder: SampleBuilder, *, epoch: int, step: int) -> list[PreparedSample]:
        blocks = builder.bridge_blocks(row.row_id, row.query, row.target.text, self.corruption, epoch=epoch, step=step)
        return [builder.join_blocks(blocks)]

    def collate(self, samples: list[PreparedSample], options: PackOptions) -> PackedBatch:
        return collate_bridge(samples, options, mask_kind=self.mask_kind)


class ContrastiveData:
    """Stage 3: ``contrastive.jsonl``, two samples a pair, nothing masked."""

    def __init__(self, settings: TrainSettings) -> None:
        self.row_set = stage_rows("contrastive", settings.data, seed=settings.seed)
        needed, found = settings.contrastive.global_batch_size, len(self.row_set.rows)
        if found < needed:
            raise ValueError(
                f"stage contrastive has {found} pairs, contrastive.global_batch_size is {needed}: a pair "
                f"that occurs twice in a step is its own negative; lower global_batch_size"
            )

    def groups(self) -> list[Hashable]:
        # A pair and the same pair turned round: in one step, the text of one is a negative for itself in the other.
        return [frozenset((row.query, row.target)) for row in self.row_set.rows]

    def measure(self, row: PairRow, builder: SampleBuilder) -> list[SampleSize]:
        return [builder.measure(content) for content in (row.query, row.target)]

    def prepare(self, row: PairRow, builder: SampleBuilder, *, epoch: int, step: int) -> list[PreparedSample]:
        return [
            builder.embedding(f"{row.row_id}#query", row.query),
            builder.embedding(f"{row.row_id}#target", row.target),
        ]

    def collate(self, samples: list[PreparedSample], options: PackOptions) -> PackedBatch:
        return collate_contrastive(samples, options)


STAGE_DATA: dict[str, type] = {"warmup": WarmupData, "bridge": BridgeData, "contrastive": ContrastiveData}
