"""Memory of one rank during a stage, computed from architecture, layout and batch before anything is started.

What persists: parameters, FP32 gradients, master weights and Adam's moments. What comes and goes: the activations of
the micro-batches that the pipeline schedule keeps in flight, and at the fullest moment of a backward pass what one
layer, or the token head, needs on top. The fullest moment is one of a few, and all are computed: the loss, the
uppermost language layer's backward, the uppermost tower layer's, the gradient of the embedding matrix, and in
stage ``contrastive`` the loss over the gathered embeddings.

Not counted: the CUDA context, communication buffers, and fragmentation. ``HEADROOM`` leaves room for them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.config import Recompute, RecomputeSettings, TrainSettings
from megatron_cocoa.model.language import padded_vocab_size
from megatron_cocoa.objectives.contrastive import ROWS_PER_BLOCK
from megatron_cocoa.planning.activations import (
    GPU_KERNELS,
    Kernels,
    LayerMemory,
    element_size,
    language_shape,
    layer_memory,
    norm_saved,
    tower_shape,
)
from megatron_cocoa.planning.packs import PackShape, expected_microbatches
from megatron_cocoa.planning.parameters import layers_of_stage, rank_parameters
from megatron_cocoa.planning.schedule import in_flight

HEADROOM = 0.12
"""Share of a GPU's memory that a plan leaves free, for what is not counted."""


_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000
"""Elements of a bucket of Megatron's DDP under ``overlap_grad_reduce``: at least so many, and so many for each rank."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank of a pipeline stage at its fullest moment.

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


@dataclass(frozen=True)
class _MicrobatchMemory:
    """Bytes of one micro-batch on one rank: what each part saves, and its moments beyond that.

    waiting: the output layer's gradient, where it is the embedding matrix and waits for that one's.
    """

    tower: int
    language: int
    head: int
    tower_backward: int
    language_backward: int
    head_moment: int
    embedding_gradient: int
    waiting: int

    @property
    def saved(self) -> int:
        return self.tower + self.language + self.head

    def fullest_moment(self) -> int:
        """The most that this micro-batch holds beyond ``saved``, while it is differentiated; later parts are gone."""
        return max(
            self.head_moment,
            self.language_backward + self.waiting - self.head,
            self.tower_backward + self.waiting - self.head - self.language,
            self.embedding_gradient + self.waiting - self.saved,
        )


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
    found = []
    for rank in range(settings.parallel.pipeline_model_parallel_size):
        held = rank_parameters(architecture, settings, pipeline_rank=rank, with_image_decoder=stage == "warmup")
        element = element_size(settings.model)
        per_parameter = 12 if element == 2 else 8
        sharers = replicas * settings.parallel.context_parallel_size
        activations, transient = _activations(architecture, settings, pack, kernels, rank, number)
        if rank == settings.parallel.pipeline_model_parallel_size - 1 and exchange:
            # With one micro-batch the graph is still there while the global loss is differentiated.
            beside = activations if number == 1 else 0
            transient = max(activations + transient, beside + exchange) - activations
        # Gradients are reduced when the last backward pass is over and activations are gone.
        transient = max(activations + transient, _reduction(settings, kernels, held.trainable, sharers)) - activations
        found.append(
            RankMemory(
                pipeline_rank=rank,
                parameters=held.total * element,
                gradients=held.trainable * 4,
                optimizer=-(
                    -held.trainable * per_parameter // (sharers if settings.parallel.use_distributed_optimizer else 1)
                ),
                activations=activations,
                transient=transient,
            )
        )
    return found


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
    one = _microbatch(architecture, settings, pack, kernels, pipeline_rank, chunks=len(moments[0]))
    fullest = max(held[0] * one.tower + sum(held) * one.language + held[-1] * one.head for held in moments)
    return fullest, max(0, one.fullest_moment())


def _microbatch(
    architecture: QwenVLArchitecture,
    settings: TrainSettings,
    pack: PackShape,
    kernels: Kernels,
    pipeline_rank: int,
    *,
    chunks: int,
) -> _MicrobatchMemory:
    parallel, text = settings.parallel, architecture.text
    is_first, is_last = pipeline_rank == 0, pipeline_rank == parallel.pipeline_model_parallel_size - 1
    shape = language_shape(architecture, settings.model, parallel)
    rows = -(-pack.tokens // parallel.context_parallel_size)
    of_layer = functools.partial(
        layer_memory,
        shape,
        rows,
        kernels,
        layers_per_block=settings.recompute.language_num_layers or 1,
        trains=not settings.freeze.language,
    )
    read = None
    if is_last and not pack.runs_decoder:
        read = -(-(pack.supervised + pack.embeddings) // parallel.context_parallel_size)
    number = layers_of_stage(text.num_hidden_layers, parallel, pipeline_rank) // chunks
    modes = _layer_modes(settings.recompute, "language", number)
    of_mode = {mode: of_layer(recompute=mode) for mode in set(modes)}
    layers = [of_mode[mode] for mode in modes]
    layer, last = layers[-1], of_layer(recompute=modes[-1], read=read)
    outside = -(-rows // shape.tensor_parallel) if shape.sequence_parallel else rows
    residual, whole = outside * shape.hidden * shape.element, rows * shape.hidden * shape.element
    # Sequence parallelism gathers whole rows before a linear and scatters its input's gradient after it.
    gathered = 2 * whole if shape.sequence_parallel else 0
    language = sum(layer.saved for layer in layers) + pack.tokens * text.head_dim * shape.element
    if not kernels.releases_outputs and (chunks > 1 or not is_last):
        language += residual
    tower, tower_layer = _tower(architecture, settings, pack, kernels) if is_first else (0, LayerMemory(0, 0, 0))
    head, moment = 0, 0
    if is_last:
        head, moment = _heads(architecture, settings, pack, kernels, rows)
        # The last layer and the final norm lie in the last chunk alone, as the heads do.
        head += last.saved - layer.saved + norm_saved(shape, rows if read is None else read)
    # Of the last layer; or of one before it, when the last is gone (of another chunk, when it may still be there).
    gone, before = last.saved if chunks == 1 else 0, layers[max(0, number - 2)]
    backward = max(last.rerun + last.working, before.rerun + before.working - gone)
    vocabulary = _vocabulary_rows(architecture, settings) * text.hidden_size * shape.element if is_first else 0
    is_shared = architecture.tie_word_embeddings and is_first and is_last and pack.supervised > 0
    return _MicrobatchMemory(
        tower=tower,
        language=language,
        head=head,
        tower_backward=tower_layer.rerun + tower_layer.working,
        language_backward=backward + last.saved - layer.saved + gathered,
        head_moment=moment,
        embedding_gradient=vocabulary + whole,
        waiting=vocabulary if is_shared else 0,
    )


def _layer_modes(recompute: RecomputeSettings, name: Literal["vision", "language"], number: int) -> list[Recompute]:
    """What each of a chunk's layers recomputes."""
    mode: Recompute = getattr(recompute, name)
    if mode != "mlp":
        return [mode] * number
    again = recompute.mlp_layers(name, number)
    return ["mlp"] * again + ["none"] * (number - again)


def _vocabulary_rows(architecture: QwenVLArchitecture, settings: TrainSettings) -> int:
    """Rows of the word embeddings, or of the output layer, on one rank."""
    tp = settings.parallel.tensor_model_parallel_size
    return padded_vocab_size(architecture.text.vocab_size, settings.model.make_vocab_size_divisible_by, tp) // tp


def _tower(
    architecture: QwenVLArchitecture, settings: TrainSettings, pack: PackShape, kernels: Kernels
) -> tuple[int, LayerMemory]:
    """Bytes that tower and merger save, and the memory of one tower layer. A frozen tower saves nothing."""
    vision, parallel = architecture.vision, settings.parallel
    shape = tower_shape(architecture, settings.model, parallel)
    rows = -(-pack.patches // parallel.context_parallel_size)
    modes = _layer_modes(settings.recompute, "vision", vision.depth)
    per_block = settings.recompute.vision_num_layers or 1
    of_mode = {
        mode: layer_memory(shape, rows, kernels, recompute=mode, layers_per_block=per_block) for mode in set(modes)
    }
    layers = [of_mode[mode] for mode in modes]
    units = pack.patches // vision.merge_unit
    features = units * vision.out_hidden_size * shape.element
    wide = rows * vision.hidden_size * shape.element
    saved = features
    if not (settings.freeze.vision and settings.freeze.merger):
        saved += norm_saved(shape, rows) + wide // shape.tensor_parallel
        if not kernels.remakes_inputs:
            saved += wide + wide // shape.tensor_parallel
    if settings.freeze.vision:
        return saved, LayerMemory(0, 0, 0)
    tables = rows * (vision.hidden_size // vision.num_heads) * 4
    saved += sum(layer.saved for layer in layers)
    return saved + rows * vision.patch_dim * shape.element + tables, layers[-1]


def _heads(
    architecture: QwenVLArchitecture, settings: TrainSettings, pack: PackShape, kernels: Kernels, rows: int
) -> tuple[int, int]:
    """Bytes that the heads save, and the loss's moment beyond them.

    The cross-entropy keeps its softmax in FP32 and meets logits, or their gradient, in the model's dtype; then comes
    the gradient of the output layer's weight. The pixels' error is taken in FP32, beside prediction and two copies
    of the targets in the model's dtype, and its difference is kept, in whose place its gradient comes.
    """
    text, vision, context = architecture.text, architecture.vision, settings.parallel.context_parallel_size
    shape = language_shape(architecture, settings.model, settings.parallel)
    supervised, units = -(-pack.supervised // context), -(-pack.masked_units // context)
    vocabulary = _vocabulary_rows(architecture, settings)
    logits = supervised * vocabulary
    saved = (supervised + pack.embeddings) * shape.hidden * shape.element + logits * 4
    trains = not settings.freeze.language or architecture.tie_word_embeddings
    # A matrix of its own gets a gradient of zeros where no loss reads logits.
    is_own = not architecture.tie_word_embeddings or settings.parallel.pipeline_model_parallel_size > 1
    weight = vocabulary * text.hidden_size * shape.element if trains and (supervised or is_own) else 0
    moment = max(logits * shape.element, weight - logits * (4 - shape.element))
    if pack.runs_decoder:
        of_layer = functools.partial(layer_memory, shape, rows, kernels, recompute="none")
        layer, last = of_layer(), of_layer(read=units)
        before = settings.warmup.decoder_layers - 1
        pixels = units * vision.merge_unit * vision.patch_dim
        saved += before * layer.saved + last.saved + units * shape.hidden * shape.element + pixels * 4
        error = pixels * (3 * shape.element + (4 if shape.element == 4 else 12) - 4)
        working = max(last.working, layer.working - last.saved if before else 0)
        moment = max(moment, error, working - pixels * 4)
    return saved, moment
