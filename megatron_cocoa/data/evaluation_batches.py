"""Batches for measuring: things to embed, and block B with its own or another sample's block A."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_cocoa.architecture import VisionGeometry
from megatron_cocoa.batch import MaskKind, PackedBatch
from megatron_cocoa.config import EmbeddingForm
from megatron_cocoa.data.collate import PackOptions, collate_bridge, collate_embedding
from megatron_cocoa.data.prepared import CorruptionSettings, swap_blocks
from megatron_cocoa.data.preprocess import PictureLoader, load_processor
from megatron_cocoa.data.row_parsing import checked_content
from megatron_cocoa.data.rows import Content, PairRow
from megatron_cocoa.data.samples import SampleBuilder
from megatron_cocoa.data.tokenizer import TokenizerBundle


def evaluation_builder(
    data_path: str | Path,
    *,
    model_path: str | Path,
    bundle: TokenizerBundle,
    vision: VisionGeometry,
    max_length: int,
    image_size: int | None = None,
    min_image_tokens: int | None = None,
    max_image_tokens: int | None = None,
    pad_to_multiple_of: int = 1,
    needs_pixels: bool = True,
    form: EmbeddingForm = EmbeddingForm(),
) -> tuple[SampleBuilder, PackOptions]:
    """What the functions below need, for pictures under ``data_path`` and the model in ``model_path``.

    ``form`` is the one that the model was trained to embed in. Packs are as long as their samples: each runs by itself.

    Raises:
        ValueError: as ``PictureLoader``, ``load_processor`` and ``PackOptions``.
    """
    pictures = PictureLoader(
        data_path,
        processor=load_processor(model_path),
        vision=vision,
        image_size=image_size,
        min_image_tokens=min_image_tokens,
        max_image_tokens=max_image_tokens,
    )
    builder = SampleBuilder(
        bundle=bundle,
        vision=vision,
        pictures=pictures,
        max_length=max_length,
        image_placeholder=form.image_placeholder,
    )
    options = PackOptions(
        pictures=pictures,
        vision=vision,
        pad_token_id=bundle.pad_token_id,
        pad_to_multiple_of=pad_to_multiple_of,
        needs_pixels=needs_pixels,
        embedding_mask=MaskKind(form.attention),
    )
    return builder, options


def embedding_batch(
    contents: Sequence[Content], *, builder: SampleBuilder, options: PackOptions, first: int = 0
) -> PackedBatch:
    """Pack things to embed, in order, each with a bridge appended and one embedding.

    Args:
        contents: texts, pictures (text ``<|image_1|>`` alone), or both.
        builder: lays samples out; knows the data folder and the picture size.
        options: how packs are filled.
        first: number of the first one, for error messages.

    Raises:
        ValueError: for an item that cannot be embedded: an evaluation never leaves one out.
    """
    checked = [checked_content(content.text, content.images) for content in contents]
    return collate_embedding([builder.embedding(str(first + i), c) for i, c in enumerate(checked)], options)


def bridge_batches(
    rows: Sequence[PairRow],
    *,
    builder: SampleBuilder,
    options: PackOptions,
    corruption: CorruptionSettings,
    mask_kind: MaskKind,
    batch_size: int,
    swapped: bool = False,
) -> Iterator[PackedBatch]:
    """Pack samples of stage ``bridge`` for evaluation.

    Args:
        rows: block A is the query, block B the target's text (``bridge_pairs_from``).
        builder, options: as ``embedding_batch``.
        batch_size: samples per pack.
        corruption: masks are those of epoch 0.
        mask_kind: one of the two EOS-bridged kinds.
        swapped: give each sample the block A of the next one (the last one that of the first). Block B, its mask and
            its labels are the same with and without.

    Raises:
        ValueError: as ``embedding_batch``, or for a single row that is to be swapped.
    """
    blocks = [builder.bridge_blocks(row.row_id, row.query, row.target.text, corruption, epoch=0) for row in rows]
    blocks = swap_blocks(blocks) if swapped else blocks
    for start in range(0, len(blocks), batch_size):
        samples = [builder.join_blocks(block) for block in blocks[start : start + batch_size]]
        yield collate_bridge(samples, options, mask_kind=mask_kind)
