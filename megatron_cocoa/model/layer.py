"""A transformer layer that skips, after attention, the rows that nothing reads, and recomputes less of an MLP.

Few rows of the last layer are read: supervised tokens, masked units in the image decoder, or one row a sample. Its
keys and values are needed at every row, but its output projection and MLP, nine tenths of a layer's work, only at the
rows that are read.

When Megatron recomputes an MLP, it runs all of it again. The backward pass needs only the output of the first
projection, and with linears that remake their input (``model/remade.py``) only that projection is run again.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import Module

from megatron_cocoa.model.remade import RemadeColumnParallelLinear


class ReadRowsLayer(TransformerLayer):
    """Megatron's layer; its residual stream keeps only the rows that core attention returns
    (``SequenceContext.rows_after``).

    Args:
        layer_number: in this pipeline stage and virtual chunk, from 1.
        recomputed_layers: if the config asks for recompute of MLPs, only the first so many layers do so; None for all.
        is_adapted: the MLP will have adapters, which change what its first projection returns.
    """

    def __init__(
        self,
        *args,
        layer_number: int = 1,
        recomputed_layers: int | None = None,
        is_adapted: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(*args, layer_number=layer_number, **kwargs)
        self.recompute_mlp &= recomputed_layers is None or layer_number <= recomputed_layers
        first = getattr(self.mlp, "linear_fc1", None)
        if self.recompute_mlp and isinstance(first, RemadeColumnParallelLinear) and not is_adapted:
            self.recompute_mlp, first.remakes_output = False, True
        if self.recompute_mlp:
            self.mlp.register_forward_hook(_add_bias)
        self._add_to_whole_residual = self.self_attn_bda
        self.self_attn_bda = self._add_to_residual
        self._rows: Tensor | None = None

    def forward(self, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """As Megatron's, called with ``packed_seq_params`` by keyword as its ``TransformerBlock`` does.

        Returns:
            ``(rows, 1, hidden)`` and None: all rows, or those that are read; under sequence parallelism this rank's
            part of either.
        """
        rows = kwargs["packed_seq_params"].rows_after(self.layer_number)
        if rows is not self._rows:
            # In the last layer alone: assigning an attribute of a module takes the host longer than a small operation.
            self._rows = rows
        return super().forward(*args, **kwargs)

    def _add_to_residual(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        add, rows = self._add_to_whole_residual(training, fused), self._rows
        if rows is None:
            return add
        return lambda x_with_bias, residual, prob: add(x_with_bias, self._select(residual, rows), prob)

    def _select(self, hidden_states: Tensor, rows: Tensor) -> Tensor:
        if not self.config.sequence_parallel:
            return hidden_states.index_select(0, rows)
        # The selected rows may lie on any rank and are divided anew. The MLP, which gathers rows too, then has fewer.
        whole = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        return scatter_to_sequence_parallel_region(whole.index_select(0, rows))


def _add_bias(mlp: Module, inputs: tuple, outputs: tuple[Tensor, Tensor | None]) -> tuple[Tensor, None]:
    """Forward hook of an MLP: adds the bias that Megatron's MLP would return for its caller to add.

    Under recompute Megatron's checkpoint function returns whatever the MLP returns. A parameter among these would
    become an output of the checkpoint, and using it in the next forward pass would lead back into this one's graph.
    """
    output, bias = outputs
    return output if bias is None else output + bias, None
