"""Bytes that one micro-batch keeps on one rank, part by part, and what each part's backward needs beyond that."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.config import Recompute, RecomputeSettings, TrainSettings
from megatron_cocoa.model.language import padded_vocab_size
from megatron_cocoa.planning.activations import Kernels, layer_memory, norm_saved
from megatron_cocoa.planning.adapters import language_adapters, merger_adapters, tower_adapters
from megatron_cocoa.planning.packs import PackShape
from megatron_cocoa.planning.parameters import layers_of_stage
from megatron_cocoa.planning.shapes import element_size, language_shape, tower_shape


@dataclass(frozen=True)
class MicrobatchMemory:
    """Bytes of one micro-batch on one rank: what each part saves, and its moments beyond that.

    waiting: the output layer's gradient, where it is the embedding matrix with frozen rows and waits for that one's.
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


def microbatch_memory(
    architecture: QwenVLArchitecture,
    settings: TrainSettings,
    pack: PackShape,
    kernels: Kernels,
    pipeline_rank: int,
    *,
    chunks: int,
) -> MicrobatchMemory:
    """Memory of one micro-batch on a rank of a pipeline stage.

    Args:
        architecture: published shapes.
        settings: of the run.
        pack: the micro-batch.
        kernels: what the layers at hand keep.
        pipeline_rank: of the stage.
        chunks: virtual ones on it; what ``language`` holds is of one.
    """
    parallel = settings.parallel
    is_first, is_last = pipeline_rank == 0, pipeline_rank == parallel.pipeline_model_parallel_size - 1
    rows = -(-pack.tokens // parallel.context_parallel_size)
    tower = _tower(architecture, settings, pack, kernels) if is_first else _Part(0, 0)
    layers = _language_layers(architecture, settings, pack, kernels, pipeline_rank, rows, chunks)
    # The last layer and the final norm lie in the last chunk alone, as the heads do.
    heads = _heads(architecture, settings, pack, kernels, rows) if is_last else _Part(0, 0)
    shape = language_shape(architecture, settings.model, parallel)
    # Of the batch, until the loss is known; a patch embedding that trains keeps them for its backward pass.
    pixels = _pixels(architecture, settings, pack) if is_first else 0
    kept_pixels = 0 if settings.frozen_parts.vision else pixels
    vocabulary = _vocabulary_rows(architecture, settings) * shape.hidden * shape.element if is_first else 0
    is_shared = architecture.tie_word_embeddings and is_first and is_last and pack.supervised > 0
    # If all rows train it is added to DDP's buffer at once.
    waits = is_shared and settings.frozen_parts.language
    return MicrobatchMemory(
        tower=tower.saved + kept_pixels,
        language=layers.saved,
        head=heads.saved + layers.last,
        tower_backward=tower.moment,
        language_backward=layers.moment,
        head_moment=heads.moment + pixels - kept_pixels,
        embedding_gradient=_gradients(settings) * vocabulary + rows * shape.hidden * shape.element,
        waiting=vocabulary if waits else 0,
    )


@dataclass(frozen=True)
class _Part:
    """Bytes that a part saves, and those that its fullest moment needs beyond what is saved by then.

    last: what the last layer saves more than another, which is less where it skips rows, and the final norm.
    """

    saved: int
    moment: int
    last: int = 0


def _language_layers(
    architecture: QwenVLArchitecture,
    settings: TrainSettings,
    pack: PackShape,
    kernels: Kernels,
    pipeline_rank: int,
    rows: int,
    chunks: int,
) -> _Part:
    """Of a chunk's layers, and of what goes on to the next pipeline stage."""
    parallel, text = settings.parallel, architecture.text
    is_last = pipeline_rank == parallel.pipeline_model_parallel_size - 1
    shape = language_shape(architecture, settings.model, parallel)
    of_layer = functools.partial(
        layer_memory,
        shape,
        rows,
        kernels,
        layers_per_block=settings.recompute.language_num_layers or 1,
        trains=not settings.frozen_parts.language,
        adapters=language_adapters(shape, settings.adapter),
    )
    read = None
    if is_last and not pack.runs_decoder:
        read = -(-(pack.supervised + pack.embeddings) // parallel.context_parallel_size)
    number = layers_of_stage(text.num_hidden_layers, parallel, pipeline_rank) // chunks
    modes = _layer_modes(settings.recompute, "language", number)
    of_mode = {mode: of_layer(recompute=mode) for mode in set(modes)}
    layers = [of_mode[mode] for mode in modes]
    layer, last = layers[-1], of_layer(recompute=modes[-1], read=read)
    saved = sum(layer.saved for layer in layers) + pack.tokens * text.head_dim * shape.element
    if chunks > 1 or not (kernels.releases_outputs or is_last):
        saved += shape.rows_outside(rows) * shape.hidden * shape.element
    # Of the last layer; or of one before it, when the last is gone (of another chunk, when it may still be there).
    gone, before = last.saved if chunks == 1 else 0, layers[max(0, number - 2)]
    backward = max(last.rerun + last.working, before.rerun + before.working - gone)
    # Sequence parallelism gathers whole rows before a linear and scatters its input's gradient after it.
    gathered = 2 * rows * shape.hidden * shape.element if shape.sequence_parallel else 0
    final_norm = norm_saved(shape, rows if read is None else read) if is_last else 0
    more = last.saved - layer.saved
    return _Part(saved, backward + more + gathered, last=more + final_norm)


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


def _gradients(settings: TrainSettings) -> int:
    """Of the embedding matrix at once: where only the mask token's row trains, the others are set to zero in a copy."""
    return 2 if settings.frozen_parts.language else 1


def _pixels(architecture: QwenVLArchitecture, settings: TrainSettings, pack: PackShape) -> int:
    rows = -(-pack.patches // settings.parallel.context_parallel_size)
    return rows * architecture.vision.patch_dim * element_size(settings.model)


def _tower(architecture: QwenVLArchitecture, settings: TrainSettings, pack: PackShape, kernels: Kernels) -> _Part:
    """Of tower and merger; its moment is one layer's. A frozen tower without adapters saves nothing."""
    vision, freeze = architecture.vision, settings.frozen_parts
    shape = tower_shape(architecture, settings.model, settings.parallel)
    adapters = tower_adapters(architecture, shape, settings.adapter)
    rows = -(-pack.patches // settings.parallel.context_parallel_size)
    is_learning = not freeze.vision or bool(adapters)
    features = pack.patches // vision.patches_per_unit * vision.out_hidden_size * shape.element
    saved = features + _merger_saved(architecture, settings, rows, kernels, is_passed=is_learning)
    if not is_learning:
        return _Part(saved, 0)
    modes = _layer_modes(settings.recompute, "vision", vision.depth)
    of_mode = {
        mode: layer_memory(
            shape,
            rows,
            kernels,
            recompute=mode,
            layers_per_block=settings.recompute.vision_num_layers or 1,
            trains=not freeze.vision,
            adapters=adapters,
        )
        for mode in set(modes)
    }
    layers = [of_mode[mode] for mode in modes]
    tables = rows * (vision.hidden_size // vision.num_heads) * 4
    saved += sum(layer.saved for layer in layers) + tables
    return _Part(saved, layers[-1].rerun + layers[-1].working)


def _merger_saved(
    architecture: QwenVLArchitecture, settings: TrainSettings, rows: int, kernels: Kernels, *, is_passed: bool
) -> int:
    """Bytes that the merger saves; ``is_passed``: gradients pass through it to the tower."""
    vision, is_frozen = architecture.vision, settings.frozen_parts.merger
    shape = tower_shape(architecture, settings.model, settings.parallel)
    adapters = merger_adapters(architecture, shape, settings.adapter)
    if is_frozen and not is_passed and not adapters:
        return 0
    wide = rows * vision.hidden_size * shape.element
    saved = norm_saved(shape, rows) + wide // shape.tensor_parallel
    if not is_frozen and not kernels.remakes_inputs:
        saved += wide + wide // shape.tensor_parallel
    for adapted in adapters.values():
        saved += adapted.kept_input(rows // vision.patches_per_unit, shape.element, kernels.mask_element(shape.element))
        saved += adapted.kept_output(rows // vision.patches_per_unit, shape.element)
    return saved


def _heads(
    architecture: QwenVLArchitecture, settings: TrainSettings, pack: PackShape, kernels: Kernels, rows: int
) -> _Part:
    """Of the heads; their moment is the loss's.

    The cross-entropy keeps logits, which become their gradient; then comes the gradient of the output layer's weight.
    The pixels' error is taken in FP32, beside prediction and targets in the model's dtype (under context parallelism
    all of the batch, and those of this share again), and its difference is kept, in whose place its gradient comes.
    """
    text, vision, context = architecture.text, architecture.vision, settings.parallel.context_parallel_size
    shape = language_shape(architecture, settings.model, settings.parallel)
    supervised, units = -(-pack.supervised // context), -(-pack.masked_units // context)
    vocabulary = _vocabulary_rows(architecture, settings)
    logits = supervised * vocabulary
    saved = (supervised + pack.embeddings) * shape.hidden * shape.element + logits * shape.element
    trains = not settings.frozen_parts.language or architecture.tie_word_embeddings
    # A matrix of its own gets a gradient of zeros where no loss reads logits.
    is_own = not architecture.tie_word_embeddings or settings.parallel.pipeline_model_parallel_size > 1
    moment = vocabulary * text.hidden_size * shape.element if trains and (supervised or is_own) else 0
    if settings.parallel.pipeline_model_parallel_size > 1:
        # On one stage the matrix waits for its gradient as embedding.
        moment *= _gradients(settings)
    if pack.runs_decoder:
        of_layer = functools.partial(layer_memory, shape, rows, kernels, recompute="none")
        layer, last = of_layer(), of_layer(read=units)
        before = settings.warmup.decoder_layers - 1
        pixels = units * vision.unit_dim
        saved += before * layer.saved + last.saved + units * shape.hidden * shape.element + pixels * 4
        targets = 1 if context == 1 else context + 1
        error = pixels * ((1 + targets) * shape.element + (4 if shape.element == 4 else 12) - 4)
        working = max(last.working, layer.working - last.saved if before else 0)
        moment = max(moment, error, working - pixels * 4)
    return _Part(saved, moment)
