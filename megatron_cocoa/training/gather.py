"""The exchange of a contrastive step: every rank gives its queries, targets and hard negatives and gets all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_cocoa.batch import PackedBatch
from megatron_cocoa.objectives import PairEmbeddings
from megatron_cocoa.parallel.device import upload


def gather_pairs(
    batches: Sequence[PackedBatch], embeddings: Sequence[Tensor], logit_scale: Tensor | None
) -> PairEmbeddings:
    """The step's pairs over micro-batches and data-parallel ranks, in the order of the global batch.

    One all-gather for vectors and one for keys, whatever the number of micro-batches. Every rank computes the whole
    loss from the result; its backward pass reaches only this rank's own rows, so that no row's gradient counts twice.

    Args:
        batches: this rank's micro-batches.
        embeddings: ``(embeddings, hidden)`` of each, part of any autograd graph.
        logit_scale: put into the result as it is.
    """
    vectors = _gather(torch.cat([_by_pair(e, batch) for e, batch in zip(embeddings, batches)]))
    keys = _gather_keys(batches, vectors.device)
    has_negatives = vectors.shape[1] > 2
    hard = None if keys is None else keys[:, 1:].unflatten(1, (-1, 2))
    return PairEmbeddings(
        queries=vectors[:, 0],
        targets=vectors[:, 1],
        target_keys=None if keys is None else keys[:, 0],
        negatives=vectors[:, 2:] if has_negatives else None,
        negative_mask=hard[..., 0].bool() if has_negatives else None,
        negative_keys=hard[..., 1] if has_negatives else None,
        logit_scale=logit_scale,
    )


def number_of_copies() -> int:
    """How many ranks compute the whole loss and have their gradients of ``logit_scale`` summed by DDP."""
    return parallel_state.get_data_parallel_world_size(with_context_parallel=True)


def _by_pair(embeddings: Tensor, batch: PackedBatch) -> Tensor:
    """Float32 ``(pairs, 2 + hard_negatives, hidden)``: query, target, negatives; zeros for missing negatives."""
    rows = torch.stack([batch.query_rows, batch.target_rows], dim=1)
    if batch.negative_rows is not None:
        rows = torch.cat([rows, batch.negative_rows], dim=1)
    rows = upload(rows, embeddings.device)
    found = embeddings.float().index_select(0, rows.clamp_min(0).flatten()).unflatten(0, tuple(rows.shape))
    return torch.where((rows >= 0).unsqueeze(-1), found, 0.0)


def _gather_keys(batches: Sequence[PackedBatch], device: torch.device) -> Tensor | None:
    """Int64 ``(pairs, 1 + 2 * hard_negatives)``: the target's key; of each negative, whether it is there, and its key.

    None where the batches have neither keys nor negatives.
    """
    if batches[0].target_keys is None:
        return None
    lines = []
    for batch in batches:
        line = batch.target_keys[:, None]
        if batch.negative_rows is not None:
            hard = torch.stack([(batch.negative_rows >= 0).to(line), batch.negative_keys], dim=2)
            line = torch.cat([line, hard.flatten(1)], dim=1)
        lines.append(line)
    return _gather(upload(torch.cat(lines), device))


def _gather(x: Tensor) -> Tensor:
    """Rows of all data-parallel ranks in rank order, the same number on each; gradients reach own rows only."""
    size = parallel_state.get_data_parallel_world_size()
    if size == 1:
        return x
    gathered = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(gathered, x.detach().contiguous(), group=parallel_state.get_data_parallel_group())
    gathered[parallel_state.get_data_parallel_rank()] = x
    return torch.cat(gathered)
