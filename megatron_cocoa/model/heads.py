"""What the last pipeline stage computes from final hidden states: rows for each head, and the image decoder.

Positions in a batch are global rows of the pack; each context-parallel rank works on those that lie in its
contiguous share. Heads see whole rows on every tensor-parallel rank: under sequence parallelism the rows are
gathered first, and the backward hands each rank its own part of an already whole gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.model.attention import SequenceContext
from megatron_cocoa.model.specs import BackendSpecProvider, block_spec
from megatron_cocoa.model.transformer_configs import ModelConfigs, without_sequence_parallel
from megatron_cocoa.parallel.collectives import sum_over


@dataclass(frozen=True)
class LocalRows:
    """This context-parallel rank's contiguous share ``[first, last)`` of a pack."""

    first: int
    last: int

    def select(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Of global row numbers, which entries lie here: their indices, and their local rows."""
        inside = ((positions >= self.first) & (positions < self.last)).nonzero().squeeze(1)
        return inside, positions.index_select(0, inside) - self.first

    def covers(self, tokens: int) -> bool:
        return self.first == 0 and self.last == tokens


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
    return LocalRows(group.rank() * share, (group.rank() + 1) * share)


def whole_rows(hidden_states: Tensor, sequence_parallel: bool) -> Tensor:
    """``(tokens_cp, hidden)`` from ``(tokens_cp [/ tensor_parallel], 1, hidden)``."""
    if sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
    return hidden_states.squeeze(1)


def gather_embeddings(hidden_rows: Tensor, positions: Tensor, rows: LocalRows, group) -> Tensor:
    """Hidden states at global ``positions``, on every context-parallel rank.

    Args:
        hidden_rows: ``(tokens_cp, hidden)``, this rank's share.
        positions: int64 ``(embeddings,)`` global rows.

    Returns:
        ``(embeddings, hidden)``.
    """
    if group.size() == 1:
        return hidden_rows.index_select(0, positions)
    inside, local = rows.select(positions)
    mine = hidden_rows.new_zeros(positions.shape[0], hidden_rows.shape[1])
    return sum_over(mine.index_copy(0, inside, hidden_rows.index_select(0, local)), group)


class ImageDecoder(MegatronModule):
    """MAE's decoder: layers as wide as the language model's, bidirectional over the sample, then a linear map.

    From MoCa (arXiv 2506.23115), the only published relative that shows one: one layer that starts from layer
    ``num_hidden_layers // 2`` of the language model, the linear map from N(0, 0.02). It reads hidden states
    after the final norm, with the same segments and rotary positions as the backbone.
    """

    def __init__(self, architecture: QwenVLArchitecture, configs: ModelConfigs, provider: BackendSpecProvider):
        super().__init__(config=configs.image_decoder)
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
            architecture.vision.merge_unit * architecture.vision.patch_dim,
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
            ``(units_local, merge_unit * patch_dim)``.
        """
        decoded = self.decoder(hidden_states=hidden_states, attention_mask=None, packed_seq_params=context)
        rows = whole_rows(decoded, self.config.sequence_parallel).index_select(0, local_positions)
        pixels, _ = self.pixel_head(rows.unsqueeze(1))
        return pixels.squeeze(1)
