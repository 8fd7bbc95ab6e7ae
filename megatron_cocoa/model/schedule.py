"""Micro-batches through Megatron's pipeline schedules, training or forward only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_cocoa.batch import ModelOutput, PackedBatch
from megatron_cocoa.model.build import Model
from megatron_cocoa.parallel import device

LossFunction = Callable[[int, ModelOutput, PackedBatch], tuple[Tensor, Any]]
"""``(index of the micro-batch, head outputs, micro-batch) -> (scalar to backpropagate, anything to return)``."""


def run_microbatches(
    model: Model, batches: Sequence[PackedBatch], loss_function: LossFunction, *, forward_only: bool = False
) -> list[Any]:
    """One pass over a rank's micro-batches; gradients are accumulated and reduced unless ``forward_only``.

    Args:
        model: this rank's chunks.
        batches: micro-batches, the same on every rank of a data-parallel replica.
        loss_function: called on the last pipeline stage for each micro-batch.
        forward_only: no gradients.

    Returns:
        What ``loss_function`` returned beside its scalar, one entry a micro-batch in order; empty on all but the
        last pipeline stage.
    """
    dtype = model.config.params_dtype

    def forward_step(data_iterator, chunk):
        index, batch = next(data_iterator)
        batch = batch.to(device.device(), dtype=dtype)
        return chunk(batch), functools.partial(_loss, loss_function, index, batch)

    iterators = [iter(list(enumerate(batches))) for _ in model.chunks]
    with torch.set_grad_enabled(not forward_only):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=model.chunks if len(model.chunks) > 1 else model.chunks[0],
            num_microbatches=len(batches),
            seq_length=batches[0].num_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _loss(loss_function: LossFunction, index: int, batch: PackedBatch, output: ModelOutput):
    loss, data = loss_function(index, output, batch)
    # Three values: Megatron then leaves the loss as it is (two would be averaged over micro-batches).
    return loss, torch.ones((), dtype=torch.int, device=loss.device), data
