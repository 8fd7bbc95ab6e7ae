"""Checks of the gradient of every objective at a layout, against plain autograd in one process on one big batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.nn import functional as F

from megatron_cocoa.batch import PackedBatch
from megatron_cocoa.checkpoint.live import global_name
from megatron_cocoa.checkpoint.mapping import EMBEDDING, OUTPUT_LAYER, NameTable
from megatron_cocoa.checkpoint.sharding import Sharding, shard
from megatron_cocoa.checkpoint.tensor_mapping import Mapping
from megatron_cocoa.config import ParallelSettings
from megatron_cocoa.model.build import Model
from megatron_cocoa.objectives import GlobalObjective, PairEmbeddings, build_objective
from megatron_cocoa.parallel import topology
from megatron_cocoa.recipes.context import RunContext
from megatron_cocoa.recipes.initial_model import build_with_weights
from megatron_cocoa.training.data_parallel import wrap_data_parallel
from megatron_cocoa.training.step import forward_backward
from tests.distributed.check import Check, degrees
from tests.distributed.uneven import OBJECTIVES, uneven_batches, uneven_context
from tests.parity.compare import largest


def bare_model(context: RunContext, stage: str) -> Model:
    """The model of a stage at the layout, with the weights of the context's seed."""
    model = build_with_weights(
        context,
        checkpoint=None,
        with_image_decoder=stage == "warmup",
        learned_temperature=context.settings.learned_temperature(stage),
    )
    model.train()
    return model


def gradients_at(model: Model, context: RunContext, objective: str, packs: int) -> float:
    """Run the step of ``objective`` with the global batch in ``packs``; returns the loss, gradients stay in buffers."""
    stage = OBJECTIVES[objective][0]
    batches = uneven_batches(context, stage, packs=packs)
    share = packs // topology.data_parallel_size()
    mine = batches[topology.data_parallel_rank() * share :][:share]
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    return forward_backward(model, build_objective(stage, context.settings), mine)["loss"]


@functools.cache
def references() -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """By objective: loss and whole gradients by Megatron name, on each rank by itself."""
    topology.set_layout(ParallelSettings(), seed=0)
    return {objective: _reference(objective) for objective in OBJECTIVES}


def _reference(objective: str) -> tuple[float, dict[str, torch.Tensor]]:
    """One forward, one loss, one backward: no schedule, no data parallelism, no cache."""
    context = uneven_context(objective, ParallelSettings())
    stage = OBJECTIVES[objective][0]
    chunk, loss_of = bare_model(context, stage).chunks[0], build_objective(stage, context.settings)
    (batch,) = uneven_batches(context, stage, packs=1)
    if isinstance(loss_of, GlobalObjective):
        loss, _ = loss_of.embedding_loss(pairs_of(chunk(batch), batch))
    else:
        loss, _ = loss_of.loss(chunk(batch), batch, loss_of.counts(batch))
    loss.backward()
    gradients = {
        global_name(chunk, name): torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in chunk.named_parameters()
    }
    return loss.item(), gradients


def pairs_of(output, batch: PackedBatch) -> PairEmbeddings:
    """The pairs of a batch that holds the whole step, row by row."""
    embeddings, rows = output.embeddings, batch.negative_rows
    pairs = PairEmbeddings(
        queries=torch.stack([embeddings[i] for i in batch.query_rows]),
        targets=torch.stack([embeddings[i] for i in batch.target_rows]),
        target_keys=batch.target_keys,
        logit_scale=output.logit_scale,
    )
    if rows is None:
        return pairs
    nothing = torch.zeros_like(embeddings[0])
    negatives = torch.stack([torch.stack([embeddings[i] if i >= 0 else nothing for i in line]) for line in rows])
    return PairEmbeddings(
        pairs.queries, pairs.targets, pairs.target_keys, negatives, rows >= 0, batch.negative_keys, pairs.logit_scale
    )


def shard_of(
    table: NameTable, name: str, whole: torch.Tensor, like: torch.Tensor, adapters: Sequence[Mapping] = ()
) -> torch.Tensor:
    """This tensor-parallel rank's part of the whole Megatron tensor ``name``."""
    ranks = dict(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
    )
    if name == "logit_scale":
        return whole
    if name.startswith("image_decoder.pixel_head."):
        return shard(whole, Sharding.COLUMN, **ranks)
    mapping = next((adapter for adapter in adapters if adapter.megatron_name == name), None)
    mapping = mapping or table.megatron_to_hf(name.replace("image_decoder.", "language_model.", 1))
    if name == EMBEDDING:
        # Each layout pads the vocabulary to a multiple of its own; padded rows get no gradient.
        whole = F.pad(whole, (0, 0, 0, like.shape[0] * ranks["tp_size"] - whole.shape[0]))
    return mapping.shard(whole, **ranks)


def worst_gradient(
    model: Model, table: NameTable, wanted: dict[str, torch.Tensor], adapters: Sequence[Mapping] = ()
) -> tuple[float, str]:
    """Largest difference over the largest entry, of the worst parameter on this rank that trains."""
    # Gradients that cancel to nothing have no scale of their own: measure those by the largest of all.
    floor = 1e-6 * max(float(g.abs().max()) for g in wanted.values())
    worst, where = 0.0, ""
    for chunk in model.bare_chunks:
        for local_name, parameter in chunk.named_parameters():
            name = global_name(chunk, local_name)
            if not parameter.requires_grad:
                assert name not in wanted, f"{name} trains in the reference and not here"
                continue
            # A tied last pipeline stage holds a copy of the embedding under this name.
            name = EMBEDDING if name == OUTPUT_LAYER and name not in wanted else name
            shard = shard_of(table, name, wanted[name], parameter, adapters)
            error = largest(parameter.main_grad - shard) / max(float(wanted[name].abs().max()), floor)
            if not error <= worst:
                worst, where = error, name
    return worst, where


def every_objective(packs: tuple[int, ...], degrees: dict) -> dict[str, dict]:
    """By objective and number of packs: error of the loss and of the worst gradient, over all ranks."""
    wanted, parallel, found = references(), ParallelSettings(**degrees), {}
    topology.set_layout(parallel, seed=0)
    models: dict = {}
    for objective, (stage, _) in OBJECTIVES.items():
        context = uneven_context(objective, parallel)
        settings = context.settings
        kind = (stage == "warmup" and settings.warmup.decoder_init, settings.learned_temperature(stage))
        if kind not in models:
            models[kind] = wrap_data_parallel(bare_model(context, stage), parallel)
        model, (loss, gradients) = models[kind], wanted[objective]
        for number in packs:
            loss_error = abs(gradients_at(model, context, objective, number) - loss) / abs(loss)
            every: list = [None] * dist.get_world_size()
            dist.all_gather_object(every, (*worst_gradient(model, context.table, gradients), loss_error))
            gradient, where, _ = max(every)
            worst_loss = max(loss_error for *_, loss_error in every)
            found[f"{objective}, {number} packs"] = dict(gradient=gradient, where=where, loss=worst_loss)
    return found


LAYOUTS: dict[str, tuple[int, tuple[int, ...], dict]] = {
    "gradients-single": (1, (1, 4), degrees()),
    "gradients-dp2": (2, (2, 8), degrees()),
    "gradients-pp2": (2, (4,), degrees(pp=2)),
    "gradients-pp2-vpp2": (2, (4,), degrees(pp=2, vpp=2)),
    "gradients-cp2": (2, (4,), degrees(cp=2)),
    "gradients-tp2-sp-pp2": (4, (4,), degrees(tp=2, pp=2, sequence_parallel=True)),
    "gradients-dp2-pp2": (4, (8,), degrees(pp=2)),
}
"""World size, numbers of packs that the global batch is cut into, degrees."""

CHECKS = {
    name: Check(size, functools.partial(every_objective, packs, degrees))
    for name, (size, packs, degrees) in LAYOUTS.items()
}
