"""Core attention for tower and language model: rotary positions, segments, context parallelism.

It replaces Megatron-Core's ``DotProductAttention`` (which materialises n x n scores) and ``TEDotProductAttention``,
and has the same constructor and call. What the layers of one forward pass share, segments and rotary tables, is
computed once and passed to all of them as Megatron's ``packed_seq_params``, in a ``SequenceContext``. Megatron's own
rotary path is not used: on packed sequences it indexes frequencies within each sequence, which is wrong for M-RoPE,
waits for the device in each layer, and assumes zig-zag context-parallel shards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_cocoa.model import flex, sdpa, varlen, varlen_kernels
from megatron_cocoa.model.remade import reshaped
from megatron_cocoa.model.rope import rotate
from megatron_cocoa.model.segments import SegmentTable
from megatron_cocoa.parallel import device
from megatron_cocoa.parallel.collectives import heads_to_sequence, sequence_to_heads

AttendFunction = Callable[[Tensor, Tensor, Tensor, SegmentTable, float], Tensor]


@dataclass
class SequenceContext(PackedSeqParams):
    """What all layers of one forward pass share about the packed sequence.

    segments:       who attends to whom, over the *whole* pack (every context-parallel rank holds it).
    layer_segments: tables of the layers that differ, by 1-based layer number (the tower's full-attention blocks).
    cos, sin:       ``(tokens, head_dim / 2)`` rotary tables of the whole pack. Rotation runs in their dtype and
                    returns to the activations' one.
    read_rows:      int64 ``(rows_read,)``, local rows of this context-parallel share: those of the last layer's output
                    that are read. The output then has only these rows (``model/layer.py``). None: every row is read.
    last_layer:     1-based number of that layer.
    """

    qkv_format: str = "sbhd"
    segments: SegmentTable | None = None
    layer_segments: dict[int, SegmentTable] | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    read_rows: Tensor | None = None
    last_layer: int | None = None

    def rows_after(self, layer_number: int) -> Tensor | None:
        """The rows that the layer with this 1-based number keeps after attention; None for all."""
        return self.read_rows if layer_number == self.last_layer else None

    def segments_of(self, layer_number: int) -> SegmentTable:
        """The table of the layer with this 1-based number."""
        return (self.layer_segments or {}).get(layer_number, self.segments)


def attend_function(
    backend: str, *, on_gpu: bool, half_precision: bool = True, setting: str = "model.attention_backend"
) -> AttendFunction:
    """The attention of a backend name.

    Args:
        backend: ``sdpa``, ``flash``, ``transformer_engine``, ``flex``, or ``auto``: flash on a GPU where a kernel
            is present, else sdpa.
        on_gpu: whether the tensors live on a GPU.
        half_precision: whether they are FP16 or BF16; the flash kernels take nothing else.
        setting: that named the backend, for the message.

    Raises:
        ValueError: for a backend whose package or device is absent, with what to install or choose.
    """
    if backend == "sdpa" or (backend == "auto" and not on_gpu):
        return sdpa.attend
    if backend == "flex":
        return flex.attend
    if backend in ("auto", "flash"):
        kernel, package = varlen_kernels.flash_kernel(), "flash-attn, or a torch with its own flash attention"
    elif backend == "transformer_engine":
        kernel, package = varlen_kernels.transformer_engine_kernel(), "transformer-engine"
    else:
        raise ValueError(f"unknown attention backend {backend!r}: choose auto, sdpa, flash, transformer_engine or flex")
    if kernel is None or not on_gpu or not half_precision:
        if backend == "auto":
            return sdpa.attend
        missing = f"{package} installed" if kernel is None else "a GPU" if not on_gpu else "model.dtype bf16"
        raise ValueError(f"attention backend {backend} needs {missing}: choose {setting}=sdpa instead")
    return lambda query, key, value, table, scale: varlen.attend_with(kernel, query, key, value, table, scale)


def check_head_split(*, num_attention_heads: int, tensor_parallel: int, context_parallel: int, name: str) -> None:
    """Refuse degrees that the head count forbids.

    Context parallelism exchanges sequence for heads, so TP x CP must divide the query heads. Key-value heads
    are repeated where there are too few.

    Raises:
        ValueError: with the numbers.
    """
    degree = tensor_parallel * context_parallel
    if num_attention_heads % degree:
        raise ValueError(
            f"{num_attention_heads} attention heads of the {name} are not divisible by tensor parallel size "
            f"{tensor_parallel} x context parallel size {context_parallel} = {degree}: choose degrees whose product "
            f"divides {num_attention_heads}"
        )


class SegmentAttention(MegatronModule):
    """Drop-in core attention over a ``SequenceContext``; see Megatron's ``DotProductAttention`` for the contract.

    ``backend`` is bound by the layer spec (see ``model/specs.py``), the remaining arguments are Megatron's.

    Attributes:
        takes_rotated: queries and keys come rotated already.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        backend: str = "auto",
        **later_arguments,
    ):
        super().__init__(config=config)
        if attention_dropout or config.attention_dropout:
            raise ValueError("segment attention has no dropout: set attention_dropout to 0")
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.context_group = groups.cp if config.context_parallel_size > 1 else None
        self.layer_number, self.takes_rotated = layer_number, False
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        half_precision = config.params_dtype in (torch.bfloat16, torch.float16)
        self.attend = attend_function(backend, on_gpu=device.has_gpu(), half_precision=half_precision)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: SequenceContext | None = None,
        **later_arguments,
    ) -> Tensor:
        """Attention of this rank's heads.

        Args:
            query: ``(tokens_local, 1, heads_local, head_dim)``, or without the 1.
            key, value: the same of ``key_value_heads_local``.
            packed_seq_params: the shared context; masks come from it alone, the other arguments are unused.

        Returns:
            ``(tokens_local, 1, heads_local * head_dim)``, or ``(rows_read, 1, ...)`` in the last layer.

        Raises:
            ValueError: if the segment table does not cover the rows at hand.
        """
        context = packed_seq_params
        if query.dim() == 4:
            query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.context_group is not None:
            query, key, value = self._to_heads(query, key, value)
        table = context.segments_of(self.layer_number)
        if table.length != query.shape[0]:
            raise ValueError(f"the segment table covers {table.length} rows, attention has {query.shape[0]}")
        if not self.takes_rotated and context.cos is not None:
            query, key = rotate(query, context.cos, context.sin), rotate(key, context.cos, context.sin)
        # Contiguous: a view would keep the whole fused projection for the backward pass, beside the rotated copies.
        out = self.attend(query, key, value.contiguous(), table, self.softmax_scale)
        if self.context_group is not None:
            out = heads_to_sequence(out, self.context_group)
        rows = context.rows_after(self.layer_number)
        if rows is not None:
            out = out.index_select(0, rows)
        return reshaped(out, out.shape[0], 1, -1)

    def _to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = self.context_group.size()
        groups, ratio = key.shape[1], query.shape[1] // key.shape[1]
        repeat = next(r for r in range(1, ratio + 1) if ratio % r == 0 and groups * r % size == 0)
        if repeat > 1:
            key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
        return tuple(sequence_to_heads(x, self.context_group) for x in (query, key, value))
