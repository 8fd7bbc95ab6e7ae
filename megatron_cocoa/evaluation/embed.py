"""Embeddings from a model at any layout, in the order of the items, independent of batch size and ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_cocoa.batch import PackedBatch
from megatron_cocoa.model.build import Model
from megatron_cocoa.model.schedule import LossFunction, run_microbatches
from megatron_cocoa.parallel import device
from megatron_cocoa.parallel.collectives import gather_rows

MakeBatch = Callable[[int, int], PackedBatch]
"""``(start, end)`` to the pack of items ``[start, end)``, one embedding each, in order."""


def embed(model: Model, *, num_items: int, batch_size: int, make_batch: MakeBatch) -> Tensor:
    """Embed ``num_items`` items; every rank calls it, and each data-parallel replica works on its own share.

    Args:
        model: chunks at the layout that is initialised.
        num_items: how many.
        batch_size: items per pack.
        make_batch: builds a pack; called for this replica's items only.

    Returns:
        float32 ``(num_items, hidden)`` on the CPU, rows of length one, the same on every rank.
    """
    model.train(False)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    edges = [num_items * part // size for part in range(size + 1)]
    first, last = edges[rank], edges[rank + 1]
    parts = []
    for start in range(first, last, batch_size):
        end = min(start + batch_size, last)
        parts.append(embed_pack(model, make_batch(start, end), rows=end - start))
    hidden = model.config.hidden_size
    mine = torch.cat(parts) if parts else torch.zeros(0, hidden, device=device.device())
    counts = tuple(b - a for a, b in zip(edges[:-1], edges[1:]))
    everything = gather_rows(mine, counts, parallel_state.get_data_parallel_group())
    return torch.nn.functional.normalize(everything, dim=-1).cpu()


def embed_pack(model: Model, batch: PackedBatch, *, rows: int) -> Tensor:
    """One pack's embeddings before they are normalised; the ranks of one model replica call it together.

    Args:
        model: chunks in evaluation mode.
        batch: the pack.
        rows: embeddings that it has.

    Returns:
        float32 ``(rows, hidden)`` on the model's device, on every rank of the replica.
    """
    found = run_pack(model, batch, _take_embeddings)
    if found is not None:
        embeddings = found.float().contiguous()
    else:
        embeddings = torch.empty(rows, model.config.hidden_size, device=device.device())
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        dist.broadcast(embeddings, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return embeddings


def run_pack(model: Model, batch: PackedBatch, collect: LossFunction) -> Any:
    """Run one pack forward; the ranks of one model replica call it together.

    Returns:
        What ``collect`` returns beside its scalar; None on all but the last pipeline stage.
    """
    # An interleaved pipeline runs as many micro-batches at a time as it has stages.
    stages = parallel_state.get_pipeline_model_parallel_world_size() if len(model.chunks) > 1 else 1
    found = run_microbatches(model, [batch] * stages, collect, forward_only=True)
    return found[0] if found else None


def _take_embeddings(index, output, batch):
    return output.embeddings.sum(), output.embeddings.detach()
