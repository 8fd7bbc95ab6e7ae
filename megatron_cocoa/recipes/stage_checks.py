"""What would stop a stage, refused before the first stage of a run trains."""

from __future__ import annotations

from megatron_cocoa.objectives.contrastive import check_matryoshka_dims
from megatron_cocoa.parallel import topology
from megatron_cocoa.recipes.context import RunContext


def check_contrastive(context: RunContext) -> None:
    """Refuse, before any stage trains, what the objective of stage ``contrastive`` would refuse at its first step.

    Raises:
        ValueError: if the model's embeddings are not as wide as asked for, a step has a single pair, or nothing trains.
    """
    settings = context.settings.contrastive
    check_matryoshka_dims(settings.matryoshka_dims, context.architecture.text.hidden_size)
    if settings.global_batch_size < 2:
        raise ValueError("contrastive.global_batch_size is 1, needs 2 or more: each pair's negatives are the others")
    frozen = context.settings.freeze
    is_model_frozen = frozen.vision and frozen.merger and frozen.language and not context.settings.adapter.is_used
    if is_model_frozen and not settings.learnable_temperature:
        # Unlike in the other stages: there is no image decoder, and no text holds the mask token.
        raise ValueError(
            "freeze.vision, freeze.merger and freeze.language leave nothing to train in stage contrastive: set one of "
            "them to false, or leave the stage out"
        )


def check_microbatches(context: RunContext, stage: str) -> None:
    """Refuse batch sizes that the layout cannot run.

    Raises:
        ValueError: if the global batch does not divide, or an interleaved pipeline gets too few micro-batches.
    """
    parallel = context.settings.parallel
    if context.settings.data.tokens_per_microbatch is not None:
        # The number of packs is found when a step is planned, as a multiple of what an interleaved pipeline needs.
        context.settings.stage(stage).samples_per_rank(topology.data_parallel_size())
        return
    number = context.settings.stage(stage).num_microbatches(topology.data_parallel_size())
    stages = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size and number % stages:
        raise ValueError(
            f"stage {stage} has {number} micro-batches a rank: an interleaved pipeline of {stages} stages needs a "
            f"multiple of {stages}; change {stage}.global_batch_size or {stage}.micro_batch_size"
        )
