"""The adapters of one Megatron projection: LoRA (arXiv 2106.09685) or DoRA (arXiv 2402.09353).

A fused projection holds several of Hugging Face's modules (q, k, v), each with an A and a B of its own. The A of all
of them are stacked, and one B has the projection's own rows, each multiplied with its owner's A alone: so B is cut
and stored exactly like the weight beside it, whatever part of the heads a tensor-parallel rank holds.

Communication is as wide as the rank of the adapters, not as the model: under tensor parallelism the products with A
are what is gathered or summed, never the input.

Shape legend: s local tokens, S tokens that the projection's output has, I local input features, O local output rows,
P targeted modules, r rank of the adapters.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_cocoa.config import AdapterSettings
from megatron_cocoa.model.adapter_targets import NO_TARGET, Site
from megatron_cocoa.parallel.dropout import dropout


class LinearAdapter(nn.Module):
    """Adapters of one column- or row-parallel projection; ``after_linear`` is its forward hook.

    Parameters, with peft's names: ``lora_A`` ``(P * r, I)``, replicated for a column-parallel projection and cut in
    dimension 1 for a row-parallel one; ``lora_B`` ``(O, r)``, cut like the weight's rows or replicated; for DoRA
    ``lora_magnitude_vector`` ``(O,)`` in FP32, like ``lora_B``. Rows without an owner stay zero and train nothing.

    Args:
        site: the projection, whose weight is loaded.
        settings: rank, scale, dropout, kind.
    """

    def __init__(self, site: Site, settings: AdapterSettings):
        super().__init__()
        linear, weight = site.linear, site.linear.weight
        self.is_column, self.is_gated = site.is_column, site.is_gated
        self.sequence_parallel = bool(linear.config.sequence_parallel)
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.scaling, self.dropout = settings.scaling, settings.dropout
        rows, columns = weight.shape
        like = dict(dtype=weight.dtype, device=weight.device)
        self.lora_A = nn.Parameter(torch.zeros(site.num_parts * settings.rank, columns, **like))
        self.lora_B = nn.Parameter(torch.zeros(rows, settings.rank, **like))
        owners = _local_rows(site).to(weight.device)
        of_part = owners.unsqueeze(1) == torch.arange(site.num_parts, device=weight.device)
        self.register_buffer("of_part", of_part.to(weight.dtype), persistent=False)
        self.register_buffer("has_owner", owners != NO_TARGET, persistent=False)
        self.lora_magnitude_vector = None
        if settings.kind == "dora":
            # In BF16 a magnitude of one could move in steps of 1/256 only, and would not start at the weight's length.
            length = torch.where(self.has_owner, self.row_lengths(weight), 0.0)
            self.lora_magnitude_vector = nn.Parameter(length)
        self._mark()

    def _mark(self) -> None:
        """Tell Megatron which parameters are shards, and whose gradients are parts to be summed over ranks."""
        sharded = [self.lora_B, self.lora_magnitude_vector] if self.is_column else [self.lora_A]
        replicated = [self.lora_A] if self.is_column else [self.lora_B, self.lora_magnitude_vector]
        for parameter in sharded:
            if parameter is not None:
                set_tensor_model_parallel_attributes(parameter, True, 0 if self.is_column else 1, 1)
        for parameter in replicated:
            if parameter is not None:
                # Each rank sees its own rows of the sequence only.
                parameter.sequence_parallel = self.sequence_parallel

    def after_linear(self, linear: nn.Module, inputs: tuple, outputs: tuple) -> tuple:
        """Forward hook of the projection: the same pair, with the adapters in the first."""
        output, bias = outputs
        # Through __call__: Megatron's DDP waits in a hook for parameters that are still being gathered.
        return self(inputs[0], linear, output, bias), bias

    def forward(self, x: Tensor, linear: nn.Module, output: Tensor, returned_bias: Tensor | None) -> Tensor:
        """The projection's output with adapters.

        Args:
            x: ``(s, 1, I)``, the projection's input.
            linear: the projection.
            output: ``(S, 1, O)``, what it returned; its own bias is in it unless it was returned apart.
            returned_bias: the bias if the projection leaves it to its caller.
        """
        is_dropping = self.training and self.dropout > 0
        # Shards differ over tensor-parallel ranks: features of a row-parallel input, rows under sequence parallel.
        is_sharded = not self.is_column or self.sequence_parallel
        dropped = dropout(x, self.dropout, is_sharded=is_sharded) if is_dropping else x
        update = F.linear(self._meet(F.linear(dropped, self.lora_A)), self._rows_of_b()) * self.scaling
        if self.lora_magnitude_vector is None:
            return output + update
        bias = None if returned_bias is not None else linear.bias
        # As in peft: with dropout the rescaled part sees the dropped input too, which costs a second product. Not
        # through __call__, whose hook is this module.
        plain = linear.forward(dropped)[0] if is_dropping else output
        if bias is not None and bias.numel():
            plain = plain - bias
        scale = self.row_scale(linear.weight)
        return output + (scale - 1).to(output.dtype) * plain + scale.to(output.dtype) * update

    def _meet(self, low: Tensor) -> Tensor:
        """Products with A ``(s, 1, P * r)`` of this rank to those that its rows of B multiply, ``(S, 1, P * r)``."""
        if self.is_column and self.sequence_parallel:
            return gather_from_sequence_parallel_region(low, group=self.tp_group)
        if self.is_column:
            return copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(low, group=self.tp_group)

    def _rows_of_b(self) -> Tensor:
        """B with each row in its owner's columns, ``(O, P * r)``: zero where another part's A stands."""
        return (self.lora_B.unsqueeze(1) * self.of_part.unsqueeze(2)).flatten(1)

    def row_scale(self, weight: Tensor) -> Tensor:
        """DoRA's magnitude over the length of each adapted row, float32 ``(O,)``; one where nobody owns the row.

        The length takes part in no gradient (DoRA, section 4.3).
        """
        length = self.row_lengths(weight)
        is_scaled = self.has_owner & (length > 0)
        return torch.where(is_scaled, self.lora_magnitude_vector / torch.where(is_scaled, length, 1.0), 1.0)

    @torch.no_grad()
    def row_lengths(self, weight: Tensor) -> Tensor:
        """Length of each row of ``W + scaling * B A`` over all input features, float32 ``(O,)``.

        ``|w + s b A|^2 = |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b``, so that no matrix of the weight's size is built.
        """
        b, a = self._rows_of_b().float(), self.lora_A.float()
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        squares += 2 * self.scaling * (F.linear(weight, self.lora_A).float() * b).sum(1)
        squares += self.scaling**2 * ((b @ (a @ a.t())) * b).sum(1)
        if not self.is_column:
            dist.all_reduce(squares, group=self.tp_group)
        return squares.clamp_(min=0).sqrt_()

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The weight that does by itself what ``weight`` and the adapters do together; FP32 until the last cast."""
        total = weight.float() + self.scaling * (self._rows_of_b().float() @ self.lora_A.float())
        if self.lora_magnitude_vector is not None:
            total *= self.row_scale(weight).unsqueeze(1)
        return total.to(weight.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Megatron's description of each parameter's place; gate and up of a gated projection come apart."""
        groups = ensure_metadata_has_dp_cp_group(metadata)
        cut = {"lora_B": 0, "lora_magnitude_vector": 0} if self.is_column else {"lora_A": 1}
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            cut,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=groups["dp_cp_group"],
        )
        if self.is_gated:
            for name in cut:
                if prefix + name in state:
                    state[prefix + name] = apply_swiglu_sharded_factory(state[prefix + name], sharded_offsets)
        return state


def _local_rows(site: Site) -> Tensor:
    """Owners of this tensor-parallel rank's rows."""
    if not site.is_column:
        return site.row_owners
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    halves = site.row_owners.chunk(2 if site.is_gated else 1)
    return torch.cat([half.chunk(size)[rank] for half in halves])
