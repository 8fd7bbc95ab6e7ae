"""Checks of gradient caching: dropout is replayed, and the number of exchanges does not grow with micro-batches."""

from __future__ import annotations

import functools
from collections import Counter
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_cocoa.config import ParallelSettings, RecomputeSettings
from megatron_cocoa.model.build import Model
from megatron_cocoa.objectives import build_objective
from megatron_cocoa.parallel import topology
from megatron_cocoa.parallel.random_state_tape import RandomStateTape
from megatron_cocoa.parallel.random_states import random_states, seed_everything, set_random_states
from megatron_cocoa.training import step as training_step
from megatron_cocoa.training.data_parallel import wrap_data_parallel
from megatron_cocoa.training.gather import gather_pairs
from tests.distributed.check import Check, degrees
from tests.distributed.gradients import bare_model, gradients_at
from tests.distributed.uneven import uneven_batches, uneven_context

OBJECTIVE, PACKS = "contrastive-hard-negatives", 4
RECOMPUTE = RecomputeSettings(language="full", vision="full")


def dropping_model(parallel: ParallelSettings, recompute: RecomputeSettings):
    """A model whose layers drop units in both ways that Megatron knows, and its context.

    Layers drop hidden units from the default random state (or, under sequence parallelism, from Megatron's tracked
    one); besides, each MLP's output is dropped from the tracked state, as a tensor-parallel adapter would do it.
    """
    context = uneven_context(OBJECTIVE, parallel, recompute=recompute)
    model = wrap_data_parallel(bare_model(context, "contrastive"), parallel)
    for chunk in model.bare_chunks:
        for module in chunk.modules():
            if isinstance(module, TransformerLayer):
                module.hidden_dropout = 0.2
                module.mlp.register_forward_hook(_drop)
    return model, context


def _drop(module, inputs, output):
    with tensor_parallel.get_cuda_rng_tracker().fork():
        return F.dropout(output[0], p=0.2, training=module.training), output[1]


@contextmanager
def recorded_embeddings():
    """Embeddings of each pass of a step by the identity of the micro-batch, on the last pipeline stage."""
    passes: list[dict[int, torch.Tensor]] = []
    run = training_step.run_microbatches

    def recording(model, batches, loss_function, **options):
        seen: dict[int, torch.Tensor] = {}
        passes.append(seen)

        def recorded(index, output, batch):
            seen[id(batches[index])] = output.embeddings.detach().clone()
            return loss_function(index, output, batch)

        return run(model, batches, recorded, **options)

    training_step.run_microbatches = recording
    try:
        yield passes
    finally:
        training_step.run_microbatches = run


def replayed_dropout(parallel_degrees: dict, recompute: bool) -> dict[str, float]:
    """Differences of the second pass from the first: embeddings, with replay and without, and the states after.

    Also the pass in which the loss is computed, 0 on ranks that do not.
    """
    parallel = ParallelSettings(**parallel_degrees)
    topology.set_layout(parallel, seed=0)
    model, context = dropping_model(parallel, RECOMPUTE if recompute else RecomputeSettings())
    found: dict[str, float] = {"loss_in_pass": 0}
    replay, differentiate = RandomStateTape.replay, training_step._cached_gradients
    for name in ("with_replay", "without_replay"):
        if name == "without_replay":
            RandomStateTape.replay = lambda tape, key: None
        try:
            with recorded_embeddings() as passes:

                def noted(*args, passes=passes):
                    found["loss_in_pass"] = len(passes)
                    return differentiate(*args)

                training_step._cached_gradients = noted
                gradients_at(model, context, OBJECTIVE, PACKS * topology.data_parallel_size())
        finally:
            RandomStateTape.replay, training_step._cached_gradients = replay, differentiate
        first, second = passes
        found[name] = max((float((second[key] - first[key]).abs().max()) for key in first), default=0.0)
        found[f"{name}_compared"] = len(first)
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    return {name: max(one[name] for one in gathered) for name in found}


def dropout_gradients(recompute: bool) -> dict[str, float]:
    """Cached gradients under dropout against one graph over all micro-batches with the same masks."""
    topology.set_layout(ParallelSettings(), seed=0)
    model, context = dropping_model(ParallelSettings(), RECOMPUTE if recompute else RecomputeSettings())
    seed_everything(7)
    before = random_states()
    loss = gradients_at(model, context, OBJECTIVE, PACKS)
    after = random_states()
    cached = _gradients(model)
    set_random_states(before)
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    batches = [batch.materialized() for batch in uneven_batches(context, "contrastive", packs=PACKS)]
    embeddings = [model.chunks[0](batch).embeddings for batch in batches]
    whole, _ = build_objective("contrastive", context.settings).embedding_loss(gather_pairs(batches, embeddings, None))
    same_states = all(torch.equal(a, b) for a, b in zip(_flat(random_states()), _flat(after)))
    whole.backward()
    direct = _gradients(model)
    clean = uneven_context(OBJECTIVE, ParallelSettings())
    undropped = gradients_at(
        wrap_data_parallel(bare_model(clean, "contrastive"), ParallelSettings()), clean, OBJECTIVE, PACKS
    )
    worst = max(float((cached[n] - direct[n]).abs().max() / direct[n].abs().max().clamp_min(1e-6)) for n in direct)
    return dict(
        gradient=worst,
        loss=abs(loss - whole.item()) / abs(whole.item()),
        dropout_matters=abs(loss - undropped) / abs(undropped),
        same_states=float(same_states),
    )


def _gradients(model: Model) -> dict[str, torch.Tensor]:
    return {name: p.main_grad.clone() for name, p in model.bare_chunks[0].named_parameters()}


def _flat(states) -> list[torch.Tensor]:
    return [states[0], *(states[2][name] for name in sorted(states[2]))]


class CountedCollectives(TorchDispatchMode):
    """Calls of torch.distributed's collectives by name, below all wrappers and aliases."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def collectives_of_a_step() -> dict[str, dict[str, int]]:
    """Collective calls of one step by number of micro-batches a rank, and by kind."""
    parallel = ParallelSettings(overlap_grad_reduce=True, use_distributed_optimizer=True)
    topology.set_layout(parallel, seed=0)
    context = uneven_context("contrastive-learned-temperature", parallel)
    model = wrap_data_parallel(bare_model(context, "contrastive"), parallel)
    counts = {}
    for packs in (1, 2, 4):
        with CountedCollectives() as counted:
            gradients_at(model, context, "contrastive-learned-temperature", packs * topology.data_parallel_size())
        counts[f"{packs} a rank"] = dict(counted.calls)
    return counts


DROPOUT: dict[str, tuple[int, dict, bool]] = {
    "dropout-dp2-recompute": (2, degrees(), True),
    "dropout-pp2": (2, degrees(pp=2), False),
    "dropout-pp2-vpp2-recompute": (2, degrees(pp=2, vpp=2), True),
    "dropout-tp2-sp": (2, degrees(tp=2, sequence_parallel=True), False),
    "dropout-cp2": (2, degrees(cp=2), False),
}
"""World size, degrees, and whether activations are recomputed."""

CHECKS = {
    **{name: Check(size, functools.partial(replayed_dropout, *rest)) for name, (size, *rest) in DROPOUT.items()},
    "dropout-gradients": Check(1, functools.partial(dropout_gradients, False)),
    "dropout-gradients-recompute": Check(1, functools.partial(dropout_gradients, True)),
    "collectives-of-a-step": Check(2, collectives_of_a_step),
}
