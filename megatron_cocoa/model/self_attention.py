"""Self attention of a layer: the fused projection, core attention over segments, the output projection."""

from __future__ import annotations

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_cocoa.model.attention import SequenceContext
from megatron_cocoa.model.rope import split_and_rotate


class SegmentSelfAttention(SelfAttention):
    """Megatron's, which takes its fused projection apart and rotates queries and keys in one step.

    Megatron splits and copies, core attention rotates, and the backward pass puts three gradients together again. It
    still goes that way where context parallelism exchanges rows for heads before they are rotated, and where there are
    more tensor-parallel ranks than key-value heads.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        self.core_attention.takes_rotated = (
            config.context_parallel_size == 1 and config.num_query_groups >= config.tensor_model_parallel_size
        )
        # A list, since assigning an attribute of a module takes the host a hundred times as long.
        self._contexts: list[SequenceContext] = []

    def forward(self, *args, packed_seq_params: SequenceContext, **kwargs) -> tuple[Tensor, Tensor | None]:
        """As Megatron's."""
        self._contexts.append(packed_seq_params)
        try:
            return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
        finally:
            self._contexts.pop()

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, ...]:
        """``(tokens, heads_local, head_dim)`` and twice ``(tokens, key_value_heads_local, head_dim)``.

        Where Megatron splits, with its dimension for the batch, of one sequence, after the tokens.
        """
        context = self._contexts[-1]
        if not self.core_attention.takes_rotated or context.cos is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        fused, _ = self.linear_qkv(hidden_states)
        groups, dim = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        return split_and_rotate(fused.view(fused.shape[0], groups, -1, dim), context.cos, context.sin)
