"""What the last pipeline stage computes from final hidden states: rows for each head, and the image decoder.

Positions in a batch are global rows of the pack; each context-parallel rank works on those that lie in its
contiguous share. Heads see whole rows on every tensor-parallel rank: under sequence parallelism the rows are
gathered first, and the backward hands each rank its own part of an already whole gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.nn import functional

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.batch import PackedBatch
from megatron_cocoa.model.attention import SequenceContext
from megatron_cocoa.model.specs import BackendSpecProvider, block_spec
from megatron_cocoa.model.transformer_configs import ModelConfigs, without_sequence_parallel
from megatron_cocoa.parallel.collectives import sum_over
from megatron_cocoa.parallel.device import upload


class Selection(NamedTuple):
    """Those of a list of global rows that lie on this context-parallel rank.

    entries: int64 ``(selected,)``: their indices in the list, in order.
    rows:    int64 ``(selected,)``: their row numbers within this rank's share.
    is_all:  no context parallelism: every entry is here.
    """

    entries: Tensor
    rows: Tensor
    is_all: bool

    def of(self, values: Tensor) -> Tensor:
        """``(selected, ...)``: of ``(entries, ...)``, one for each of the list, those that belong to ``rows``.

        ``values`` itself where all are here: targets of masked units are as large as the pixels that they hide.
        """
        return values if self.is_all else values.index_select(0, self.entries)


@dataclass(frozen=True)
class LocalRows:
    """This context-parallel rank's contiguous share ``[first, last)`` of a pack of ``tokens`` rows."""

    first: int
    last: int
    tokens: int

    @property
    def is_whole(self) -> bool:
        return self.last - self.first == self.tokens

    def select(self, positions: Tensor, target: torch.device) -> Selection:
        """Which of the global rows ``positions``, int64 ``(entries,)`` in host memory, lie in this share.

        Found on the host, since a GPU that is asked how many they are finishes all queued work first.

        Args:
            target: device of the result.
        """
        if self.is_whole:
            return Selection(torch.arange(positions.shape[0], device=target), upload(positions, target), is_all=True)
        inside = ((positions >= self.first) & (positions < self.last)).nonzero().squeeze(1)
        rows = positions.index_select(0, inside) - self.first
        return Selection(upload(inside, target), upload(rows, target), is_all=False)


def local_rows(tokens: int, group) -> LocalRows:
    """The share of the rank at hand of a pack of ``tokens`` rows.

    Raises:
        ValueError: if the pack does not divide; the collator pads packs with a tail segment for that.
    """
    size = group.size()
    if tokens % size:
        raise ValueError(
            f"a pack of {tokens} tokens is not divisible by context parallel size {size}: pad it with a tail segment"
        )
    share = tokens // size
    return LocalRows(group.rank() * share, (group.rank() + 1) * share, tokens)


def padded_rows(rows: Tensor, multiple: int) -> Tensor:
    """``rows``, int64 ``(rows,)``, followed by zeros up to a positive multiple of ``multiple``; nobody reads those."""
    return functional.pad(rows, (0, -rows.shape[0] % multiple or (0 if rows.shape[0] else multiple)))


@dataclass(frozen=True)
class HeadRows:
    """Which rows of this context-parallel share the heads read for one batch.

    text, units, embeddings: of ``text_positions``, ``unit_positions`` and ``embedding_positions`` those on this rank;
                             None where the batch has no such positions and the head does not run.
    language:                int64 ``(rows_read,)``: local rows of the language model's output that are read, first by
                             the token head, then as embeddings. The image decoder reads every row.
    """

    text: Selection | None
    units: Selection | None
    embeddings: Selection | None
    language: Tensor

    @classmethod
    def of(cls, batch: PackedBatch, rows: LocalRows) -> HeadRows:
        every = (batch.text_positions, batch.unit_positions, batch.embedding_positions)
        target = batch.input_ids.device
        text, units, embeddings = (None if found is None else rows.select(found, target) for found in every)
        none = batch.input_ids.new_zeros(0)
        language = torch.cat([none if head is None else head.rows for head in (text, embeddings)])
        return cls(text, units, embeddings, language)

    @property
    def ends(self) -> tuple[int, int]:
        """Where the token head's rows end in ``language``, and the embeddings'."""
        text, embeddings = (0 if head is None else head.rows.shape[0] for head in (self.text, self.embeddings))
        return text, text + embeddings


def whole_rows(hidden_states: Tensor, sequence_parallel: bool) -> Tensor:
    """``(tokens_cp, hidden)`` from ``(tokens_cp [/ tensor_parallel], 1, hidden)``."""
    if sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
    return hidden_states.squeeze(1)


def gather_embeddings(found: Tensor, entries: Tensor, total: int, group) -> Tensor:
    """All embeddings of a pack, on every context-parallel rank.

    Args:
        found: ``(embeddings_local, hidden)``, those in this rank's share.
        entries: int64 ``(embeddings_local,)``: their indices among all embeddings of the pack.
        total: number of embeddings of the pack.
        group: the context-parallel group.

    Returns:
        ``(total, hidden)``.
    """
    if group.size() == 1:
        return found
    return sum_over(found.new_zeros(total, found.shape[1]).index_copy(0, entries, found), group)


class ImageDecoder(MegatronModule):
    """MAE's decoder: layers as wide as the language model's, bidirectional over the sample, then a linear map.

    CoCoA's release leaves it out. This one follows MoCa (arXiv 2506.23115), the only related work that shows one:
    one layer that starts from layer ``num_hidden_layers // 2`` of the language model, and a linear map drawn from
    N(0, 0.02). It reads the hidden states after the final norm, with the backbone's segments and rotary positions.

    Args:
        architecture: gives the widths.
        configs: Megatron configs; ``image_decoder`` is used.
        provider: local or Transformer Engine modules.
        row_multiple: as of ``QwenVL``.
    """

    def __init__(
        self,
        architecture: QwenVLArchitecture,
        configs: ModelConfigs,
        provider: BackendSpecProvider,
        *,
        row_multiple: int = 1,
    ):
        super().__init__(config=configs.image_decoder)
        self.row_multiple = row_multiple
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.decoder = TransformerBlock(
            config=configs.image_decoder,
            spec=block_spec(provider, configs.image_decoder, configs.image_decoder.num_layers),
            post_layer_norm=False,
            pre_process=True,
            post_process=True,
            pg_collection=groups,
        )
        self.pixel_head = ColumnParallelLinear(
            architecture.text.hidden_size,
            architecture.vision.unit_dim,
            config=without_sequence_parallel(configs.image_decoder),
            init_method=configs.image_decoder.init_method,
            bias=True,
            gather_output=True,
            tp_group=groups.tp,
        )

    def forward(self, hidden_states: Tensor, context: SequenceContext, local_positions: Tensor) -> Tensor:
        """Pixels of masked units.

        Args:
            hidden_states: ``(tokens_local, 1, hidden)`` after the final norm, sharded as the layers hand it over.
            context: of the same pack.
            local_positions: int64 ``(units_local,)`` rows within this context-parallel share.

        Returns:
            ``(units_local, unit_dim)``.
        """
        read = padded_rows(local_positions, self.row_multiple)
        context = replace(context, read_rows=read, last_layer=self.config.num_layers)
        decoded = self.decoder(hidden_states=hidden_states, attention_mask=None, packed_seq_params=context)
        rows = whole_rows(decoded, self.config.sequence_parallel)[: local_positions.shape[0]]
        pixels, _ = self.pixel_head(rows.unsqueeze(1))
        return pixels.squeeze(1)
