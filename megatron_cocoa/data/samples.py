"""Rows to samples: the token layout of each stage, with masks drawn, before anything is packed.

A picture stands in a text as ``<|vision_start|><|image_pad|> x units<|vision_end|>``, or as the pads alone. Raw
text otherwise: no chat template, which would insert further tokens with the bridge's id. The bridge's row is recorded
here; nobody searches for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from megatron_cocoa.architecture import VisionGeometry
from megatron_cocoa.data import corruption
from megatron_cocoa.data.cost import SampleSize
from megatron_cocoa.data.decode import PictureError
from megatron_cocoa.data.positions import Segment, VisionSegment, mrope_positions
from megatron_cocoa.data.prepared import (
    NO_ROWS,
    BridgeBlocks,
    CorruptionSettings,
    EncodedContent,
    HiddenUnits,
    PreparedSample,
)
from megatron_cocoa.data.preprocess import PictureLoader
from megatron_cocoa.data.rows import IMAGE_TOKEN, PLACEHOLDER, CaptionRow, Content, PairRow
from megatron_cocoa.data.stored import PictureRef
from megatron_cocoa.data.tokenizer import TokenizerBundle


class SampleBuilder:
    """Turns rows into prepared samples for one model and one picture size.

    Args:
        bundle: tokenizer and control ids.
        vision: sizes of the tower.
        pictures: reads pictures below the data folder.
        max_length: tokens per sample; text is cut to it, picture tokens never are.
        image_placeholder: ``full`` or ``bare``, the pads without the marks around them. Positions of a bare one count
            like text's: ``get_rope_index`` as the authors ran it looks for ``<|vision_start|>``.

    All methods raise ``PictureError`` for a picture that cannot be used or does not fit into ``max_length``.
    """

    def __init__(
        self,
        *,
        bundle: TokenizerBundle,
        vision: VisionGeometry,
        pictures: PictureLoader,
        max_length: int,
        image_placeholder: Literal["full", "bare"] = "full",
    ) -> None:
        self.bundle = bundle
        self.vision = vision
        self.pictures = pictures
        self.max_length = max_length
        self.image_placeholder = image_placeholder
        self._has_marks = image_placeholder == "full"
        self._num_marks = 2 if self._has_marks else 0

    def warmup(self, row: CaptionRow, settings: CorruptionSettings, *, epoch: int, step: int = 0) -> PreparedSample:
        """Picture, then caption; both masked. No bridge."""
        content, cut = self._fit(self._encode(Content(IMAGE_TOKEN + row.caption, row.image_path)), reserved=0)
        sample = self._lay_out(row.row_id, content, with_bridge=False, num_cut=cut)
        ids = sample.input_ids
        eligible = np.flatnonzero(self._is_eligible(ids, settings))
        # Nothing comes before row 0 that could predict it.
        eligible = eligible[eligible > 0]
        masked = corruption.draw_text_mask(
            eligible,
            ratio=settings.text_mask_ratio,
            at_least_one=settings.mask_at_least_one,
            generator=corruption.seeded_generator(settings.seed, epoch, row.row_id, "text"),
        )
        labels = ids[masked]
        ids[masked] = self.bundle.mask_token_id
        hidden = self._corrupt_units(sample.feature_rows.size, settings, row.row_id, epoch=epoch, step=step)
        return replace(
            sample,
            text_rows=masked - 1,
            text_labels=labels,
            num_eligible=eligible.size,
            masked_units=hidden.units,
            masked_patches=hidden.patches,
            unit_noise=hidden.noise,
        )

    def bridge_blocks(
        self,
        row_id: str,
        block_a: Content,
        target_text: str,
        settings: CorruptionSettings,
        *,
        epoch: int,
        step: int = 0,
    ) -> BridgeBlocks:
        """Blocks A and B of one sample, B masked. Where both are too long, each keeps half of the room."""
        content, ids = self._encode(block_a), self.bundle.encode_text(target_text)
        keep_a, keep_b = self._share_room(content.num_text, ids.size, self._picture_tokens(content), row_id)
        cut = content.num_text - keep_a + ids.size - keep_b
        content, ids = content.cut(keep_a), ids[:keep_b].copy()
        eligible = np.flatnonzero(self._is_eligible(ids, settings))
        # Counted from the bridge (row 0), so that block B's first token is eligible: the bridge's row predicts it.
        hidden = -1 + corruption.draw_text_mask(
            eligible + 1,
            ratio=settings.text_mask_ratio,
            at_least_one=settings.mask_at_least_one,
            generator=corruption.seeded_generator(settings.seed, epoch, row_id, "text"),
        )
        labels = ids[hidden]
        ids[hidden] = self.bundle.mask_token_id
        num_units = self._picture_tokens(content) - self._num_marks * len(content.pictures)
        assert not settings.by_patch, "block A's pictures are hidden by merged units"
        units = self._corrupt_units(num_units, settings, row_id, epoch=epoch, step=step)
        return BridgeBlocks(row_id, content, ids, hidden, labels, eligible.size, units.units, units.noise, cut)

    def join_blocks(self, blocks: BridgeBlocks) -> PreparedSample:
        """``[block A][bridge][block B]`` with one position index over the whole."""
        sample = self._lay_out(blocks.sample_id, blocks.block_a, with_bridge=True, num_cut=blocks.num_cut)
        segments = (*sample.segments[:-1], sample.segments[-1] + blocks.masked_ids.size)
        return replace(
            sample,
            input_ids=np.concatenate([sample.input_ids, blocks.masked_ids]),
            segments=segments,
            position_ids=self._positions(segments),
            text_rows=sample.bridge + blocks.hidden,
            text_labels=blocks.labels,
            num_eligible=blocks.num_eligible,
            masked_units=blocks.masked_units,
            unit_noise=blocks.unit_noise,
        )

    def embedding(self, sample_id: str, content: Content, *, picture: np.ndarray | None = None) -> PreparedSample:
        """``[content][bridge]``, nothing hidden; ``picture`` (``PictureLoader.prepare``) stands for a file's."""
        encoded, cut = self._fit(self._encode(content, picture), reserved=1)
        return self._lay_out(sample_id, encoded, with_bridge=True, num_cut=cut)

    def pair(self, row: PairRow, negatives: Sequence[Content] = ()) -> list[PreparedSample]:
        """Query, target and the chosen hard negatives of a row, each ``[content][bridge]`` with its role."""
        sides = [("query", "query", row.query), ("target", "target", row.target)]
        sides += [(f"negative{number}", "negative", content) for number, content in enumerate(negatives)]
        return [replace(self.embedding(f"{row.row_id}#{name}", content), role=role) for name, role, content in sides]

    def measure(self, content: Content, *, with_bridge: bool = True) -> SampleSize:
        """The size of ``embedding(content)``, or of ``warmup`` without a bridge, by the pictures' headers alone."""
        text, patches, units = self._measure(content)
        room = self.max_length - int(with_bridge) - units
        if room < 0:
            raise self._too_long(units, "sample")
        tokens = min(text, room) + units + int(with_bridge)
        return SampleSize(tokens, patches, pairs=tokens**2)

    def measure_bridge(self, block_a: Content, target_text: str, *, ratio: float) -> SampleSize:
        """The size of what ``bridge_blocks`` and ``join_blocks`` make, by the pictures' headers alone."""
        text, patches, units = self._measure(block_a)
        keep_a, keep_b = self._share_room(text, self.bundle.encode_text(target_text).size, units, "sample")
        a, b = units + keep_a, keep_b
        # Block A sees itself and the bridge, block B likewise, the bridge sees all.
        return SampleSize(a + 1 + b, patches, pairs=a * (a + 1) + b * (b + 1) + a + 1 + b, labels=ratio * b)

    def _measure(self, content: Content) -> tuple[int, tuple[int, ...], int]:
        """Text tokens, patches of each picture, and tokens of all pictures, their marks included."""
        texts, refs = split_content(content)
        grids = [self.pictures.planned_grid(ref) for ref in refs]
        text = sum(self.bundle.encode_text(piece).size for piece in texts)
        patches = tuple(t * h * w for t, h, w in grids)
        return text, patches, sum(self.vision.num_units(grid) + self._num_marks for grid in grids)

    def _share_room(self, text_a: int, text_b: int, picture_tokens: int, name: str) -> tuple[int, int]:
        """Text tokens that blocks A and B keep."""
        room = self.max_length - 1 - picture_tokens
        keep_a = min(text_a, max(room - text_b, room // 2))
        keep_b = min(text_b, room - keep_a)
        if keep_a < 0 or keep_b < 1:
            raise self._too_long(picture_tokens, name)
        return keep_a, keep_b

    def _encode(self, content: Content, picture: np.ndarray | None = None) -> EncodedContent:
        texts, refs = split_content(content, has_picture=picture is not None)
        pictures = tuple(map(self.pictures.load, refs)) if picture is None else (picture,)
        assert len(texts) == len(pictures) + 1, content
        return EncodedContent(tuple(map(self.bundle.encode_text, texts)), pictures)

    def _picture_tokens(self, content: EncodedContent) -> int:
        grids = map(self.pictures.grid, content.pictures)
        return sum(self.vision.num_units(grid) + self._num_marks for grid in grids)

    def _fit(self, content: EncodedContent, *, reserved: int) -> tuple[EncodedContent, int]:
        room = self.max_length - reserved - self._picture_tokens(content)
        if room < 0:
            raise self._too_long(self._picture_tokens(content), "sample")
        keep = min(content.num_text, room)
        return (content, 0) if keep == content.num_text else (content.cut(keep), content.num_text - keep)

    def _too_long(self, picture_tokens: int, name: str) -> PictureError:
        return PictureError(
            "picture_longer_than_max_length",
            f"{name}: its pictures take {picture_tokens} tokens, which leaves no room for text in "
            f"data.max_length {self.max_length}: raise it, or make pictures smaller (image_size)",
        )

    def _lay_out(self, sample_id: str, content: EncodedContent, *, with_bridge: bool, num_cut: int) -> PreparedSample:
        bundle = self.bundle
        grids = tuple(self.pictures.grid(picture) for picture in content.pictures)
        parts: list[np.ndarray] = [content.texts[0]]
        segments: list[Segment] = [content.texts[0].size]
        for grid, text in zip(grids, content.texts[1:]):
            units = self.vision.num_units(grid)
            pads = np.full(units, bundle.image_token_id, dtype=np.int64)
            if self._has_marks:
                marks = np.array([[bundle.vision_start_token_id], [bundle.vision_end_token_id]], dtype=np.int64)
                parts += [marks[0], pads, marks[1], text]
                segments[-1] += 1
                segments += [VisionSegment(grid), 1 + text.size]
            else:
                parts += [pads, text]
                segments[-1] += units + text.size
        if with_bridge:
            parts.append(np.array([bundle.bridge_token_id], dtype=np.int64))
            segments[-1] += 1
        ids = np.concatenate(parts)
        return PreparedSample(
            sample_id=sample_id,
            input_ids=ids,
            segments=tuple(segments),
            position_ids=self._positions(tuple(segments)),
            bridge=ids.size - 1 if with_bridge else None,
            pictures=content.pictures,
            grid_thw=grids,
            feature_rows=np.flatnonzero(ids == bundle.image_token_id),
            num_cut=num_cut,
        )

    def _positions(self, segments: tuple[Segment, ...]) -> np.ndarray:
        vision = self.vision
        return mrope_positions(
            segments, spatial_merge_size=vision.spatial_merge_size, tokens_per_second=vision.tokens_per_second
        )

    def _is_eligible(self, ids: np.ndarray, settings: CorruptionSettings) -> np.ndarray:
        """Bool, shaped as ``ids``: which tokens may be masked."""
        if settings.eligible_tokens == "words":
            return self.bundle.is_word(ids)
        eligible = ~self.bundle.is_special(ids)
        if settings.eligible_tokens == "all_but_image":
            eligible |= (ids == self.bundle.vision_start_token_id) | (ids == self.bundle.vision_end_token_id)
        return eligible

    def _corrupt_units(
        self, num_units: int, settings: CorruptionSettings, sample_id: str, *, epoch: int, step: int
    ) -> HiddenUnits:
        if not num_units or not settings.unit_mask_ratio:
            return HiddenUnits(NO_ROWS, NO_ROWS if settings.by_patch else None)
        per_unit = self.vision.patches_per_unit if settings.by_patch else 1
        key = (settings.seed, epoch, sample_id, "units")
        masked = corruption.draw_unit_mask(
            num_units * per_unit, ratio=settings.unit_mask_ratio, generator=corruption.seeded_generator(*key)
        )
        noise = corruption.UnitNoise(
            settings.mae_noise, key, num_units * per_unit, masked.size, (settings.seed, step)
        )
        if settings.by_patch:
            return HiddenUnits(np.unique(masked // per_unit), masked, noise)
        return HiddenUnits(masked, None, noise)


def split_content(content: Content, *, has_picture: bool = False) -> tuple[list[str], list[PictureRef]]:
    """Pieces of text, and the pictures between them in the order in which the text shows them.

    Args:
        content: checked (``row_parsing.checked_content``): marks and pictures agree.
        has_picture: the one picture is in memory: its mark splits the text, and no reference is returned.
    """
    if has_picture:
        return content.text.split(IMAGE_TOKEN), []
    if not content.images:
        return [content.text], []
    pieces = PLACEHOLDER.split(content.text)
    return pieces[::2], [content.images[int(number) - 1] for number in pieces[1::2]]
