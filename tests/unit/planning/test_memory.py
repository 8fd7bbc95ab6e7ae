"""What a plan counts, against the same bytes by hand: of a 3B in BF16, on a GPU, whose kernels keep linears' inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_cocoa.config import (
    ContrastiveSettings,
    FreezeSettings,
    ParallelSettings,
    RecomputeSettings,
    TrainSettings,
)
from megatron_cocoa.planning.activations import GPU_KERNELS
from megatron_cocoa.planning.memory import RankMemory, stage_memory
from megatron_cocoa.planning.microbatch import MicrobatchMemory, microbatch_memory
from megatron_cocoa.planning.packs import PackShape
from megatron_cocoa.planning.published import published_architecture

ARCHITECTURE = published_architecture("qwen2.5-vl-3b")
HIDDEN, FFN, LAYERS, VOCABULARY, ROTARY = 2048, 11008, 36, 151936, 128
TOWER, TOWER_FFN, TOWER_LAYERS, TOWER_ROTARY, PATCH = 1280, 3420, 32, 80, 3 * 2 * 14 * 14
PACK = PackShape(tokens=2048, patches=4096, supervised=256)
FEATURES = 4096 // 4 * HIDDEN * 2


def microbatch(*, pipeline_rank: int = 0, **groups) -> MicrobatchMemory:
    settings = TrainSettings(**groups)
    return microbatch_memory(ARCHITECTURE, settings, PACK, GPU_KERNELS, pipeline_rank, chunks=1)


def rank_memory(stage: str, pack: PackShape, *, world_size: int, **groups) -> RankMemory:
    (found,) = stage_memory(ARCHITECTURE, TrainSettings(**groups), stage, world_size=world_size, pack=pack)
    return found


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("block", [None, 4])
def test_full_recompute_keeps_the_input_of_each_block_of_a_share(block, context):
    """Claim: a context-parallel rank keeps its share of rows, patches and logits, and one input for so many layers as a
    recomputed block has; angles of the whole pack, and features of all pictures, lie on every rank."""
    found = microbatch(
        recompute=RecomputeSettings("full", "full", block, block),
        parallel=ParallelSettings(context_parallel_size=context),
    )
    rows, patches, supervised, layers = 2048 // context, 4096 // context, 256 // context, block or 1
    assert found.language == LAYERS // layers * rows * HIDDEN * 2 + 2048 * ROTARY * 2
    merger = patches * (3 * TOWER * 2 + TOWER * 2 + 4)
    outside = patches * (PATCH * 2 + TOWER_ROTARY * 4) + FEATURES + merger
    assert found.tower == TOWER_LAYERS // layers * patches * TOWER * 2 + outside
    # Of the supervised rows: the input of the final norm and its statistics, that of the output layer, and logits.
    assert found.head == supervised * (HIDDEN * 2 + 4 + HIDDEN * 2 + VOCABULARY * 2)
    assert found.embedding_gradient == VOCABULARY * HIDDEN * 2 + rows * HIDDEN * 2


@pytest.mark.parametrize("number", [1, 5])
def test_as_many_mlps_as_asked_are_recomputed(number):
    """Claim: of the first so many layers, gate, up and the second projection's input are not kept; of the others, are.

    Of tower and language model by numbers of their own.
    """
    plain = microbatch()
    found = microbatch(recompute=RecomputeSettings("mlp", "mlp", number + 1, number))
    assert plain.language - found.language == number * 2048 * 3 * FFN * 2
    assert plain.tower - found.tower == (number + 1) * 4096 * 3 * TOWER_FFN * 2


def test_a_frozen_embedding_needs_its_gradient_twice():
    """Claim: where the mask token's row alone trains, the gradient of all rows lies beside a copy without the others:
    of the embedding, and of the output layer, tied to it on another pipeline stage."""
    one, frozen = VOCABULARY * HIDDEN * 2, FreezeSettings(language=True)
    assert microbatch(freeze=frozen).embedding_gradient - microbatch().embedding_gradient == one
    last = dict(pipeline_rank=1, parallel=ParallelSettings(pipeline_model_parallel_size=2))
    assert microbatch(**last).head_moment == one
    assert microbatch(**last, freeze=frozen).head_moment == 2 * one


def test_a_frozen_merger_keeps_no_inputs():
    """Claim: frozen behind a tower that trains, it keeps what its input's gradient needs and not the inputs of its
    linears; behind a frozen one nothing, and the features alone are there."""
    wide = 4096 * TOWER * 2
    assert microbatch().tower - microbatch(freeze=FreezeSettings(merger=True)).tower == 2 * wide
    assert microbatch(freeze=FreezeSettings(vision=True)).tower == FEATURES + 4096 * (TOWER * 2 + 4) + 3 * wide
    assert microbatch(freeze=FreezeSettings(vision=True, merger=True)).tower == FEATURES


def test_context_parallel_ranks_share_the_optimizer():
    """Claim: the distributed optimizer is cut over replicas and their context-parallel ranks, gradients are not."""
    sharded = dict(use_distributed_optimizer=True)
    alone = rank_memory("bridge", PACK, world_size=1, parallel=ParallelSettings(**sharded))
    for context in (1, 2, 4):
        parallel = ParallelSettings(context_parallel_size=context, **sharded)
        found = rank_memory("bridge", PACK, world_size=8, parallel=parallel)
        assert (found.optimizer, found.gradients) == (-(-alone.optimizer // 8), alone.gradients)


def test_shared_hard_negatives_are_columns_of_every_row():
    """Claim: where the loss decides, shared hard negatives are compared with every query, 256 queries at a time, in
    five matrices; where each query has its own, the rank of all embeddings, in FP64, takes more than that."""
    pairs, negatives = 131072, 15
    asked = ContrastiveSettings(global_batch_size=pairs, micro_batch_size=1, num_hard_negatives=negatives)
    pack = PackShape(tokens=512, patches=0, embeddings=17)
    shared, own = (
        rank_memory("contrastive", pack, world_size=1, contrastive=contrastive)
        for contrastive in (asked, replace(asked, hard_negatives_shared=False))
    )
    similarities = 256 * pairs * (1 + negatives) * 4 * 5
    assert shared.transient - own.transient == similarities - (2 * pairs * HIDDEN * 8 + HIDDEN**2 * 8 * 3)
