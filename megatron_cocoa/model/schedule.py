"""Micro-batches through Megatron's pipeline schedules, training or forward only."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_cocoa.batch import ModelOutput, PackedBatch
from megatron_cocoa.model.build import Model
from megatron_cocoa.parallel import device
from megatron_cocoa.parallel.threads import map_ahead

LossFunction = Callable[[int, ModelOutput, PackedBatch], tuple[Tensor, Any]]
"""``(index of the micro-batch, head outputs, micro-batch) -> (scalar to backpropagate, anything to return)``."""

BeforeForward = Callable[[tuple[int, int]], None]
"""Called with ``(index of the micro-batch, index of the chunk)`` just before each forward run of a chunk."""


def microbatches_ahead(number: int, *, num_chunks: int) -> int:
    """How many of ``number`` micro-batches gradient caching runs forward ahead of the pass with gradients.

    All but the last, whose pass with gradients can come first and gives its embeddings. Interleaved chunks take whole
    rounds of micro-batches alone, so that there it is all of them.
    """
    return number if num_chunks > 1 else number - 1


def run_microbatches(
    model: Model,
    batches: Sequence[PackedBatch],
    loss_function: LossFunction,
    *,
    forward_only: bool = False,
    before_forward: BeforeForward | None = None,
) -> list[Any]:
    """One pass over a rank's micro-batches; gradients are accumulated and reduced unless ``forward_only``.

    Args:
        model: this rank's chunks.
        batches: micro-batches, the same on every rank of a data-parallel replica. Deferred fields are made one
            micro-batch ahead, and for as long as it is needed.
        loss_function: called on the last pipeline stage for each micro-batch.
        forward_only: no gradients.
        before_forward: sets or records what a run depends on, such as random states.

    Returns:
        What ``loss_function`` returned beside its scalar, one entry a micro-batch in order; empty on all but the
        last pipeline stage.
    """
    dtype, target = model.config.params_dtype, device.device()

    def forward_step(data_iterator, chunk):
        index, chunk_index, batch = next(data_iterator)
        batch = batch.to(target, dtype=dtype)
        if before_forward is not None:
            before_forward((index, chunk_index))
        return chunk(batch), functools.partial(_loss, loss_function, index, batch)

    chunks = model.bare_chunks
    iterators = []
    for index, chunk in enumerate(chunks):
        # Pixels are read by the first chunk of the pipeline, and targets by the last: others do without.
        reads_floats = chunk.pre_process or chunk.post_process
        is_deferred = reads_floats and any(batch.deferred is not None for batch in batches)
        make = functools.partial(_prepared, reads_floats=reads_floats, dtype=dtype, target=target)
        iterators.append(_numbered(batches, index, make, is_ahead=is_deferred or target.type != "cpu"))
    try:
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
    finally:
        for iterator in iterators:
            iterator.close()


def _numbered(
    batches: Sequence[PackedBatch], chunk_index: int, make: Callable[[PackedBatch], PackedBatch], *, is_ahead: bool
) -> Iterator[tuple[int, int, PackedBatch]]:
    """Each batch as ``make`` gives it, with its number and the chunk's; made while the one before it runs."""
    made = map_ahead(make, batches, num_workers=int(is_ahead), num_ahead=2)
    with contextlib.closing(made):
        for index in range(len(batches)):
            # No name for it: a batch lives as long as its user needs it.
            yield index, chunk_index, next(made)


def _prepared(batch: PackedBatch, *, reads_floats: bool, dtype: torch.dtype, target: torch.device) -> PackedBatch:
    """The batch with what it defers, or without where nothing reads that; for a GPU cast and in pinned memory.

    A copy from other memory would wait for all that the GPU has still to do, and let it run dry after that.
    """
    whole = batch.materialized() if reads_floats else replace(batch, deferred=None)
    if target.type == "cpu":
        return whole
    return whole.mapped(lambda x: device.staged(x.to(dtype) if x.is_floating_point() else x, target))


def _loss(loss_function: LossFunction, index: int, batch: PackedBatch, output: ModelOutput):
    loss, data = loss_function(index, output, batch)
    # Three values: Megatron then leaves the loss as it is (two would be averaged over micro-batches).
    return loss, torch.ones((), dtype=torch.int, device=loss.device), data
