"""What the two reconstruction stages have learned: block B with its own block A or another's, and masked pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_cocoa.batch import PackedBatch
from megatron_cocoa.evaluation.embed import run_pack
from megatron_cocoa.model.build import Model
from megatron_cocoa.model.heads import local_rows
from megatron_cocoa.parallel.collectives import from_last_stage


@dataclass(frozen=True)
class SampleLosses:
    """Per sample, the sum of its supervised tokens' cross-entropy in nats, how many they are, and B's other tokens.

    num_visible: tokens behind the bridge that are not masked; 0 for a sample without a bridge.
    """

    nll: tuple[float, ...]
    num_tokens: tuple[int, ...]
    num_visible: tuple[int, ...]


def sample_losses(model: Model, batches: Iterable[PackedBatch]) -> SampleLosses:
    """Run packs forward and sum token losses by sample; every rank calls it with the same packs.

    Returns:
        One entry per sample in the order of the packs, the same on every rank of a replica.
    """
    model.train(False)
    nll: list[float] = []
    counts: list[int] = []
    lengths: list[int] = []
    for batch in batches:
        ends = torch.tensor(batch.sample_lengths).cumsum(0)
        # Position i - 1 predicts token i, so a sample's supervised rows all lie within the sample.
        owner = torch.bucketize(batch.text_positions, ends, right=True)
        nll += _sums_by_sample(model, batch, owner)
        counts += torch.bincount(owner, minlength=len(ends)).tolist()
        bridges = batch.bridge_positions or (None,) * len(ends)
        lengths += [0 if bridge is None else end - 1 - bridge for end, bridge in zip(ends.tolist(), bridges)]
    visible = (max(0, length - count) for length, count in zip(lengths, counts))
    return SampleLosses(tuple(nll), tuple(counts), tuple(visible))


def _sums_by_sample(model: Model, batch: PackedBatch, owner: Tensor) -> list[float]:
    group = parallel_state.get_context_parallel_group()

    def collect(index, output, moved):
        tokens = local_rows(moved.num_tokens, group).select(moved.text_positions, output.token_nll.device)
        sums = output.token_nll.new_zeros(len(batch.sample_lengths), dtype=torch.float32)
        sums.index_add_(0, tokens.of(owner.to(sums.device)), output.token_nll.detach().float())
        return output.token_nll.sum(), sums

    found = run_pack(model, batch, collect)
    if found is not None:
        dist.all_reduce(found, group=group)
    return from_last_stage(None if found is None else found.tolist())


def predict_units(model: Model, batch: PackedBatch) -> Tensor:
    """Reconstruct the masked units of a stage-``warmup`` pack; every rank calls it. Needs the image decoder.

    Returns:
        Its pixels: float32 ``(masked_units, unit_dim)`` on the CPU, in the pack's order, the same on every rank of a
        replica.
    """
    model.train(False)

    def collect(index, output, moved):
        group = parallel_state.get_context_parallel_group()
        units = local_rows(moved.num_tokens, group).select(moved.unit_positions, output.predicted_units.device)
        whole = output.predicted_units.new_zeros(len(moved.unit_positions), output.predicted_units.shape[1])
        whole[units.entries] = output.predicted_units.detach()
        dist.all_reduce(whole, group=group)
        return output.predicted_units.sum(), whole.float()

    found = run_pack(model, batch, collect)
    return from_last_stage(None if found is None else found.cpu())
