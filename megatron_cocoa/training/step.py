"""One optimizer step's forward and backward, for both kinds of objectives.

A local objective is a sum over units: counts are summed over the data-parallel ranks first, then each micro-batch
is differentiated by itself. A global objective couples all samples of the step: embeddings are computed, gathered
once, and differentiated; their gradients then flow back per micro-batch (gradient caching, arXiv 2101.06983).
Either way the gradient is that of one process with one big batch, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_cocoa.batch import ModelOutput, PackedBatch
from megatron_cocoa.model.build import Model
from megatron_cocoa.model.schedule import run_microbatches
from megatron_cocoa.objectives import GlobalObjective, LocalObjective
from megatron_cocoa.parallel import device
from megatron_cocoa.parallel.collectives import from_last_stage

Metrics = dict[str, float]


def forward_backward(
    model: Model, objective: LocalObjective | GlobalObjective, batches: Sequence[PackedBatch]
) -> Metrics:
    """Accumulate and reduce the gradients of one step.

    Args:
        model: chunks in Megatron's DDP, gradient buffers zeroed.
        objective: of the stage.
        batches: this data-parallel rank's micro-batches.

    Returns:
        The step's metrics over the whole global batch, ``loss`` among them; the same on every rank.
    """
    if isinstance(objective, GlobalObjective):
        metrics = _global_step(model, objective, batches)
    else:
        metrics = _local_step(model, objective, batches)
    return from_last_stage(metrics)


def _local_step(model: Model, objective: LocalObjective, batches: Sequence[PackedBatch]) -> Metrics:
    totals = sum_counts([objective.counts(batch) for batch in batches])

    def loss_function(index: int, output: ModelOutput, batch: PackedBatch):
        return objective.loss(output, batch, totals)

    returned = run_microbatches(model, batches, loss_function)
    names = sorted(totals)
    if not returned:
        return dict.fromkeys([*names, "loss"], 0.0)
    sums = torch.stack([torch.stack([metrics[name].float() for name in names]) for metrics in returned]).sum(0)
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    means = {name: value / max(totals[name], 1) for name, value in zip(names, sums.tolist())}
    means["loss"] = sum(objective.weights[name] * mean for name, mean in means.items())
    return means


def sum_counts(counts: Sequence[dict[str, int]]) -> dict[str, float]:
    """Counts by term over micro-batches and data-parallel ranks (context-parallel ranks hold the same batch)."""
    names = sorted(counts[0])
    total = torch.tensor([[c[name] for name in names] for c in counts], dtype=torch.float64).sum(0)
    total = total.to(device.device())
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return dict(zip(names, total.tolist()))


def _global_step(model: Model, objective: GlobalObjective, batches: Sequence[PackedBatch]) -> Metrics:
    if len(batches) == 1:
        return _single_pass(model, objective, batches)
    collected = run_microbatches(model, batches, _collect_embeddings, forward_only=True)
    gradients: list[Tensor] = []
    metrics: Metrics = {}
    if collected:
        gradients, metrics = _embedding_gradients(objective, batches, collected)

    def surrogate(index: int, output: ModelOutput, batch: PackedBatch):
        loss = (output.embeddings.float() * gradients[index]).sum()
        return loss, None

    run_microbatches(model, batches, surrogate)
    return metrics


def _single_pass(model: Model, objective: GlobalObjective, batches: Sequence[PackedBatch]) -> Metrics:
    """With one micro-batch a rank, the graph is still there when the embeddings have been gathered."""

    def loss_function(index: int, output: ModelOutput, batch: PackedBatch):
        pairs = [output.embeddings.index_select(0, rows) for rows in (batch.query_rows, batch.target_rows)]
        loss, metrics = objective.embedding_loss(*(gather_pairs(x) for x in pairs), _keys([batch]))
        return loss, {**metrics, "loss": loss.detach()}

    returned = run_microbatches(model, batches, loss_function)
    return {name: float(value) for name, value in returned[0].items()} if returned else {}


def _collect_embeddings(index: int, output: ModelOutput, batch: PackedBatch):
    embeddings = output.embeddings.detach()
    return embeddings.sum(), embeddings


def _embedding_gradients(
    objective: GlobalObjective, batches: Sequence[PackedBatch], collected: list[Tensor]
) -> tuple[list[Tensor], Metrics]:
    """Gradient of the global loss for each micro-batch's embeddings, by one exchange over data parallel."""
    sides = [
        torch.cat([e.index_select(0, rows.to(e.device)) for e, rows in zip(collected, rows_of)]).float()
        for rows_of in ([b.query_rows for b in batches], [b.target_rows for b in batches])
    ]
    rank, count = parallel_state.get_data_parallel_rank(), sides[0].shape[0]
    loss, *gradients, metrics = objective.embedding_gradients(*(gather_pairs(x) for x in sides), _keys(batches))
    own = [g[rank * count : (rank + 1) * count] for g in gradients]
    per_batch, start = [], 0
    for embeddings, batch in zip(collected, batches):
        pairs = len(batch.query_rows)
        gradient = torch.zeros_like(embeddings, dtype=torch.float32)
        for rows, side in ((batch.query_rows, own[0]), (batch.target_rows, own[1])):
            gradient.index_add_(0, rows.to(gradient.device), side[start : start + pairs])
        per_batch.append(gradient)
        start += pairs
    return per_batch, {**{k: float(v) for k, v in metrics.items()}, "loss": float(loss)}


def gather_pairs(x: Tensor) -> Tensor:
    """Rows of all data-parallel ranks in rank order; gradients reach this rank's own rows only.

    Args:
        x: ``(pairs_local, hidden)``, the same number on each rank.

    Returns:
        ``(pairs_global, hidden)``. Every rank computes the whole loss from it, so each owns its rows' gradient.
    """
    size = parallel_state.get_data_parallel_world_size()
    if size == 1:
        return x
    gathered = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(gathered, x.detach().contiguous(), group=parallel_state.get_data_parallel_group())
    gathered[parallel_state.get_data_parallel_rank()] = x
    return torch.cat(gathered)


def _keys(batches: Sequence[PackedBatch]) -> Tensor | None:
    """Integer keys of the step's targets in global order, equal where targets are equal."""
    if batches[0].target_keys is None:
        return None
    return gather_pairs(torch.cat([b.target_keys for b in batches]).to(device.device()))

