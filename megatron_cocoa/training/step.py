"""One optimizer step's forward and backward, for both kinds of objectives.

A local objective is a sum over units: counts are summed over the data-parallel ranks first, then each micro-batch
is differentiated by itself. A global objective couples all samples of the step: embeddings are computed, gathered
once, and differentiated; their gradients then flow back per micro-batch (gradient caching, arXiv 2101.06983), under
the random states of the first pass, so that dropout is the same in both. The last micro-batch opens the second pass
and runs in it alone: its graph is kept while the loss is computed, which saves one forward run a step. Interleaved
pipelines, which take whole rounds of micro-batches, run all of them twice.
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
from megatron_cocoa.model.schedule import microbatches_ahead, run_microbatches
from megatron_cocoa.objectives import GlobalObjective, LocalObjective
from megatron_cocoa.parallel import device
from megatron_cocoa.parallel.collectives import from_last_stage
from megatron_cocoa.parallel.random_state_tape import RandomStateTape
from megatron_cocoa.training.gather import gather_pairs, number_of_copies

Metrics = dict[str, float]


def forward_backward(
    model: Model,
    objective: LocalObjective | GlobalObjective,
    batches: Sequence[PackedBatch],
    *,
    detailed: bool = False,
) -> Metrics:
    """Accumulate and reduce the gradients of one step.

    Args:
        model: chunks in Megatron's DDP, gradient buffers zeroed.
        objective: of the stage.
        batches: this data-parallel rank's micro-batches.
        detailed: also take the metrics that cost too much for every step (``GlobalObjective.embedding_loss``).

    Returns:
        The step's metrics over the whole global batch, ``loss`` among them; the same on every rank.
    """
    if isinstance(objective, GlobalObjective):
        metrics = _global_step(model, objective, batches, detailed)
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


def _global_step(model: Model, objective: GlobalObjective, batches: Sequence[PackedBatch], detailed: bool) -> Metrics:
    ahead = microbatches_ahead(len(batches), num_chunks=len(model.chunks))
    tape = RandomStateTape()
    collected: list[tuple[Tensor, Tensor | None]] = []
    if ahead:
        collected = run_microbatches(model, batches[:ahead], _collect, forward_only=True, before_forward=tape.record)
    # Those whose embeddings are not known yet come first.
    order = [*range(ahead, len(batches)), *range(ahead)]
    gradients: list[Tensor] = []
    metrics: dict[str, Tensor] = {}

    def differentiate() -> None:
        found, values = _cached_gradients(objective, batches, collected, detailed)
        gradients.extend(found)
        metrics.update(values)

    if len(collected) == len(batches):
        # Now, while no graph is held: under interleaving the second pass holds those of several micro-batches.
        differentiate()

    def replay(key: tuple[int, int]) -> None:
        place, chunk = key
        if order[place] < ahead:
            tape.replay((order[place], chunk))

    def surrogate(place: int, output: ModelOutput, batch: PackedBatch):
        index = order[place]
        if index >= ahead:
            collected.append(_collect(index, output, batch)[1])
            differentiate()
        loss = (output.embeddings.float() * gradients[index]).sum()
        if output.logit_scale is not None:
            # In every micro-batch, since gradient reduction may overlap with the last one's backward pass.
            loss = loss + output.logit_scale * gradients[-1] / (len(batches) * number_of_copies())
        return loss, None

    run_microbatches(model, [batches[index] for index in order], surrogate, before_forward=replay)
    tape.go_on()
    # Only now: reading them waits for the device, which would have nothing to do while the second pass is prepared.
    return _floats(metrics)


def _collect(index: int, output: ModelOutput, batch: PackedBatch):
    embeddings = output.embeddings.detach()
    return embeddings.sum(), (embeddings, output.logit_scale)


def _cached_gradients(
    objective: GlobalObjective,
    batches: Sequence[PackedBatch],
    collected: list[tuple[Tensor, Tensor | None]],
    detailed: bool,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradient of the global loss for each micro-batch's embeddings, by one exchange over data parallel.

    The last entry is the learned scale's, where there is one. All are float32, so that the caller's cast to the
    model's dtype is the only one.
    """
    with torch.enable_grad():
        leaves = [embeddings.float().requires_grad_() for embeddings, _ in collected]
        scale = collected[0][1]
        scale = None if scale is None else scale.detach().requires_grad_()
        pairs = gather_pairs(batches, leaves, scale)
        loss, metrics = objective.embedding_loss(pairs, detailed=detailed)
        gradients = torch.autograd.grad(loss, leaves if scale is None else [*leaves, scale])
    return list(gradients), {**metrics, "loss": loss.detach()}


def _floats(metrics: dict[str, Tensor]) -> Metrics:
    """By one copy to the host."""
    if not metrics:
        return {}
    return dict(zip(metrics, torch.stack([value.double() for value in metrics.values()]).tolist()))
