"""A sample on its way from row to pack: plain records, and the exchange of block A that evaluation measures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from megatron_cocoa.config import WarmupSettings
from megatron_cocoa.data.corruption import NoiseKind, UnitNoise
from megatron_cocoa.data.positions import Segment

NO_ROWS = np.zeros(0, dtype=np.int64)
NO_ROWS.setflags(write=False)


@dataclass(frozen=True)
class CorruptionSettings:
    """What the reconstruction stages hide.

    Args:
        seed: of the run.
        text_mask_ratio: share of eligible text tokens.
        eligible_tokens: see ``WarmupSettings``.
        unit_mask_ratio: share of merged image units, or of patches.
        by_patch: patches are hidden, each by itself, and not whole merged units.
        mask_at_least_one: mask one eligible token where the draw masked none.
        mae_noise: see ``corruption.draw_unit_noise``.
    """

    seed: int
    text_mask_ratio: float
    eligible_tokens: Literal["non_special", "words", "all_but_image"] = "non_special"
    unit_mask_ratio: float = 0.0
    by_patch: bool = False
    mask_at_least_one: bool = True
    mae_noise: NoiseKind = "normal"

    @classmethod
    def of_warmup(cls, stage: WarmupSettings, *, seed: int) -> CorruptionSettings:
        """What stage ``warmup`` hides, in training and where its reconstructions are shown."""
        return cls(
            seed=seed,
            text_mask_ratio=stage.text_mask_ratio,
            eligible_tokens=stage.eligible_tokens,
            unit_mask_ratio=stage.unit_mask_ratio,
            by_patch=stage.masked_unit == "patch",
            mask_at_least_one=stage.mask_at_least_one,
            mae_noise=stage.mae_noise,
        )


@dataclass(frozen=True)
class PreparedSample:
    """One sample, ready to be packed. Rows are local to the sample.

    Args:
        sample_id: name for error messages.
        input_ids: int64 ``(tokens,)``, masked.
        segments: token layout, from which positions follow.
        position_ids: int64 ``(3, tokens)``.
        bridge: row of the bridge, or None.
        pictures: uint8 ``(3, height, width)`` each.
        grid_thw: patches of each picture.
        feature_rows: int64 ``(units,)``: rows of the placeholders.
        text_rows, text_labels: int64 ``(supervised,)``: predicting row ``i - 1``, and the original id of ``i``.
        masked_units: int64 ``(masked_units,)``: indices among the sample's units.
        masked_patches: int64 ``(masked_patches,)``: indices among the sample's patches where patches are hidden and not
            whole units; those of ``masked_units`` then. None where units are hidden.
        unit_noise: what hides them; None where none is hidden.
        num_eligible: text tokens that could have been masked.
        num_cut: text tokens cut to fit ``max_length``.
        role: what the sample is to its pair in stage ``contrastive``: ``query``, ``target`` or ``negative``.
    """

    sample_id: str
    input_ids: np.ndarray
    segments: tuple[Segment, ...]
    position_ids: np.ndarray
    bridge: int | None = None
    pictures: tuple[np.ndarray, ...] = ()
    grid_thw: tuple[tuple[int, int, int], ...] = ()
    feature_rows: np.ndarray = field(default_factory=lambda: NO_ROWS)
    text_rows: np.ndarray = field(default_factory=lambda: NO_ROWS)
    text_labels: np.ndarray = field(default_factory=lambda: NO_ROWS)
    masked_units: np.ndarray = field(default_factory=lambda: NO_ROWS)
    masked_patches: np.ndarray | None = None
    unit_noise: UnitNoise | None = None
    num_eligible: int = 0
    num_cut: int = 0
    role: str = ""


@dataclass(frozen=True)
class HiddenUnits:
    """What is hidden of a sample's pictures: ``masked_units``, ``masked_patches``, ``unit_noise`` of a sample."""

    units: np.ndarray
    patches: np.ndarray | None = None
    noise: UnitNoise | None = None


@dataclass(frozen=True)
class EncodedContent:
    """Pieces of text with a picture between any two of them, as token ids.

    Args:
        texts: int64 ids of each piece, which may be empty; one more than there are pictures.
        pictures: uint8 ``(3, height, width)`` each.
    """

    texts: tuple[np.ndarray, ...]
    pictures: tuple[np.ndarray, ...] = ()

    @property
    def num_text(self) -> int:
        return sum(text.size for text in self.texts)

    def cut(self, keep: int) -> EncodedContent:
        """The same with only the first ``keep`` text tokens; pictures always stay."""
        starts = np.cumsum([0] + [text.size for text in self.texts[:-1]])
        kept = tuple(text[: max(0, keep - start)] for text, start in zip(self.texts, starts.tolist()))
        return replace(self, texts=kept)


@dataclass(frozen=True)
class BridgeBlocks:
    """A sample of stage ``bridge`` before its blocks are joined, so that block A can be exchanged.

    Args:
        sample_id: names the sample that block B comes from.
        block_a: picture and query text.
        masked_ids: int64 ``(tokens_b,)``: block B, masked.
        hidden: int64 ``(supervised,)``: places in block B that are masked.
        labels: int64 ``(supervised,)``: their original ids.
        num_eligible: places in block B that could have been masked.
        masked_units: units of block A's picture that are replaced by ``unit_noise``.
        unit_noise: what hides them; None where none is hidden.
        num_cut: text tokens cut to fit.
    """

    sample_id: str
    block_a: EncodedContent
    masked_ids: np.ndarray
    hidden: np.ndarray
    labels: np.ndarray
    num_eligible: int
    masked_units: np.ndarray = field(default_factory=lambda: NO_ROWS)
    unit_noise: UnitNoise | None = None
    num_cut: int = 0


def swap_blocks(blocks: list[BridgeBlocks]) -> list[BridgeBlocks]:
    """Give sample ``i`` the block A of sample ``(i + 1) % n``; its block B, mask and labels stay as they are.

    What block B's loss rises by is what the model reads from block A.

    Raises:
        ValueError: for fewer than two samples, where nothing could be exchanged.
    """
    if len(blocks) < 2:
        raise ValueError(f"found {len(blocks)} sample(s): exchanging block A needs at least 2")
    others = blocks[1:] + blocks[:1]
    return [
        replace(own, block_a=other.block_a, masked_units=other.masked_units, unit_noise=other.unit_noise)
        for own, other in zip(blocks, others)
    ]
