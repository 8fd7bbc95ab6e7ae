"""A transformer layer that goes on, after attention, with the rows alone that something reads, and recomputes lean.

Heads read few rows of the last layer: supervised tokens, masked units, or one row a sample. Its keys and values need
every row, its output projection and MLP do not, and they are nine tenths of a layer.

Where Megatron is to recompute MLPs, it runs all of an MLP again. Its first projection is all that the backward pass
needs, and linears that make their input again (``model/remade.py``) can leave it at that.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import Module

from megatron_cocoa.model.remade import RemadeColumnParallelLinear


class ReadRowsLayer(TransformerLayer):
    """Megatron's, whose residual stream follows what core attention hands on (``SequenceContext.rows_after``).

    Args:
        layer_number: in this pipeline stage and virtual chunk, from 1.
        recomputed_layers: where the config asks for recompute of MLPs, the first so many layers do so; None for all.
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
        self._rows = kwargs["packed_seq_params"].rows_after(self.layer_number)
        return super().forward(*args, **kwargs)

    def _add_to_residual(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        add, rows = self._add_to_whole_residual(training, fused), self._rows
        if rows is None:
            return add
        return lambda x_with_bias, residual, prob: add(x_with_bias, self._select(residual, rows), prob)

    def _select(self, hidden_states: Tensor, rows: Tensor) -> Tensor:
        if not self.config.sequence_parallel:
            return hidden_states.index_select(0, rows)
        # Rows lie anywhere, their new owners are others. The MLP, which gathers whole rows as well, then has fewer to.
        whole = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        return scatter_to_sequence_parallel_region(whole.index_select(0, rows))


def _add_bias(mlp: Module, inputs: tuple, outputs: tuple[Tensor, Tensor | None]) -> tuple[Tensor, None]:
    """Forward hook of an MLP that leaves no bias to its caller.

    Megatron's checkpoint returns what the MLP does. A parameter among that would become an output of the checkpoint,
    so that its next forward pass would lead back into its own backward.
    """
    output, bias = outputs
    return output if bias is None else output + bias, None
