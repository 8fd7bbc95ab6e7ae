"""Memory of one rank during a stage, computed from architecture, layout and batch before anything is started.

What persists: parameters, FP32 gradients, master weights and Adam's moments. What comes and goes: the activations of
the micro-batches that the pipeline schedule keeps in flight, and at the fullest moment of a backward pass what one
layer, or the token head, needs on top. The fullest moment is one of a few, and all are computed: the loss, the
uppermost language layer's backward, the uppermost tower layer's, the gradient of the embedding matrix, and in
stage ``contrastive`` the loss over the gathered embeddings.

Not counted: the CUDA context, communication buffers, and fragmentation. ``HEADROOM`` leaves room for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.config import TrainSettings
from megatron_cocoa.model.schedule import microbatches_ahead
from megatron_cocoa.objectives.contrastive import ROWS_PER_BLOCK
from megatron_cocoa.planning.activations import GPU_KERNELS, Kernels
from megatron_cocoa.planning.microbatch import microbatch_memory
from megatron_cocoa.planning.packs import PackShape, expected_microbatches
from megatron_cocoa.planning.parameters import RankParameters, rank_parameters
from megatron_cocoa.planning.schedule import in_flight
from megatron_cocoa.planning.shapes import element_size

HEADROOM = 0.12
"""Share of a GPU's memory that a plan leaves free, for what is not counted."""


_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000
"""Elements of a bucket of Megatron's DDP under ``overlap_grad_reduce``: at least so many, and so many for each rank."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank of a pipeline stage at its fullest moment.

    parameters:  with the copies of weights that products in FP8 read.
    activations: of all micro-batches in flight.
    transient:   what the fullest moment needs beyond them.
    """

    pipeline_rank: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    transient: int

    @property
    def persistent(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.persistent + self.activations + self.transient


def stage_memory(
    architecture: QwenVLArchitecture,
    settings: TrainSettings,
    stage: str,
    *,
    world_size: int,
    pack: PackShape,
    kernels: Kernels = GPU_KERNELS,
) -> list[RankMemory]:
    """Memory of each pipeline stage's ranks, first stage first; the one with the largest ``total`` decides.

    Args:
        architecture: published shapes.
        settings: of the run: layout, precision, recompute, frozen parts, batch sizes.
        stage: one of ``config.STAGES``.
        world_size: ranks of the run.
        pack: the largest micro-batch.
        kernels: what the layers at hand keep.

    Raises:
        ValueError: if ranks or batch sizes do not divide.
    """
    replicas = settings.parallel.data_parallel_size(world_size)
    number = expected_microbatches(architecture, settings, stage, data_parallel_size=replicas)
    exchange = _exchange(architecture, settings, stage)
    is_sharded = settings.parallel.use_distributed_optimizer
    found = []
    for rank in range(settings.parallel.pipeline_model_parallel_size):
        held = rank_parameters(architecture, settings, pipeline_rank=rank, with_image_decoder=stage == "warmup")
        sharers = replicas * settings.parallel.context_parallel_size
        activations, transient = _activations(architecture, settings, pack, kernels, rank, number)
        if rank == settings.parallel.pipeline_model_parallel_size - 1 and exchange:
            # One micro-batch's graph is there while the global loss is differentiated, if it did not run ahead.
            is_kept = microbatches_ahead(number, num_chunks=settings.parallel.num_chunks) < number
            beside = activations if is_kept else 0
            transient = max(activations + transient, beside + exchange) - activations
        # Gradients are reduced when the last backward pass is over and activations are gone.
        transient = max(activations + transient, _reduction(settings, kernels, held.trainable, sharers)) - activations
        found.append(
            RankMemory(
                pipeline_rank=rank,
                parameters=_parameter_bytes(settings, held),
                gradients=held.trainable * 4,
                optimizer=-(-_optimizer_bytes(settings, held) // (sharers if is_sharded else 1)),
                activations=activations,
                transient=transient,
            )
        )
    return found


def _parameter_bytes(settings: TrainSettings, held: RankParameters) -> int:
    """Of parameters, and of the copies of their weights that products in FP8 read."""
    model = settings.model
    plain = held.total - held.in_fp32 - (held.fp8.by_rows if model.fp8_param else 0)
    return plain * element_size(model) + held.in_fp32 * 4 + held.fp8.copies(model.fp8)


def _optimizer_bytes(settings: TrainSettings, held: RankParameters) -> int:
    """Adam's two moments in FP32, and FP32 master weights of parameters that are not FP32 themselves; whole."""
    masters = 0 if settings.model.dtype == "fp32" else held.trainable - held.in_fp32
    return held.trainable * 8 + masters * 4


def _reduction(settings: TrainSettings, kernels: Kernels, trainable: int, sharers: int) -> int:
    """Bytes that reducing the gradients takes beside their buffer.

    Gloo's reduce-scatter, which the distributed optimizer asks for, works on a copy of its input: the whole buffer at
    once, or one bucket where reductions overlap the backward pass. Its all-reduce and NCCL's operations work in place.
    """
    parallel = settings.parallel
    if not (kernels.copies_reductions and parallel.use_distributed_optimizer and sharers > 1):
        return 0
    bucket = max(_BUCKET, _BUCKET_PER_RANK * sharers) if parallel.overlap_grad_reduce else trainable
    return min(bucket, trainable) * 4


def _exchange(architecture: QwenVLArchitecture, settings: TrainSettings, stage: str) -> int:
    """Bytes of the contrastive loss over the global batch: embeddings and their gradients, similarities, metrics."""
    if stage != "contrastive":
        return 0
    own, hidden = settings.contrastive, architecture.text.hidden_size
    pairs, negatives = own.global_batch_size, own.num_hard_negatives
    candidates = pairs * (1 + negatives) if own.hard_negatives_shared else pairs + negatives
    similarities = min(pairs, ROWS_PER_BLOCK) * candidates * 4 * 5
    smaller = min(2 * pairs, hidden)
    rank_metric = 2 * pairs * hidden * 8 + smaller * smaller * 8 * 3
    return (2 + negatives) * pairs * hidden * 4 * 4 + max(similarities, rank_metric)


def _activations(
    architecture: QwenVLArchitecture,
    settings: TrainSettings,
    pack: PackShape,
    kernels: Kernels,
    pipeline_rank: int,
    num_microbatches: int,
) -> tuple[int, int]:
    """Bytes in flight on a rank, and its fullest moment beyond them.

    Under interleaving the tower lies in the first chunk and the heads in the last; layers are divided evenly.
    """
    moments = in_flight(settings.parallel, pipeline_rank=pipeline_rank, num_microbatches=num_microbatches)
    one = microbatch_memory(architecture, settings, pack, kernels, pipeline_rank, chunks=len(moments[0]))
    fullest = max(held[0] * one.tower + sum(held) * one.language + held[-1] * one.head for held in moments)
    return fullest, max(0, one.fullest_moment())
