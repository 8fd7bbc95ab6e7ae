"""How many parameters a rank holds, from the shapes alone: no model is built, so many layouts can be tried.

Tests build the real model on the meta device at every preset's layout and compare: equal, to the last bias.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.config import FreezeSettings, ModelSettings, ParallelSettings, TrainSettings
from megatron_cocoa.model.language import padded_vocab_size
from megatron_cocoa.model.layout_checks import layers_per_stage, padded_vision_ffn
from megatron_cocoa.planning.adapters import AdaptedProjection, language_adapters, merger_adapters, tower_adapters
from megatron_cocoa.planning.fp8 import Fp8Weights, fp8_weights
from megatron_cocoa.planning.shapes import language_shape, tower_shape


@dataclass(frozen=True)
class RankParameters:
    """Elements on one rank of a pipeline stage.

    trainable, frozen: with and without gradient; a tied matrix counts on each rank that holds it.
    in_fp32:           of ``trainable``: DoRA's magnitudes, which are FP32 whatever the model's dtype.
    fp8:               those whose products run in FP8.
    """

    trainable: int
    frozen: int
    in_fp32: int = 0
    fp8: Fp8Weights = Fp8Weights()

    @property
    def total(self) -> int:
        return self.trainable + self.frozen


def layers_of_stage(num_layers: int, parallel: ParallelSettings, pipeline_rank: int) -> int:
    """Language layers on a pipeline rank, all virtual chunks together."""
    size = parallel.pipeline_model_parallel_size
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    if pipeline_rank == 0 and first is not None:
        return first
    if pipeline_rank == size - 1 and last is not None:
        return last
    return layers_per_stage(num_layers, parallel)[-1]


def rank_parameters(
    architecture: QwenVLArchitecture, settings: TrainSettings, *, pipeline_rank: int, with_image_decoder: bool
) -> RankParameters:
    """Parameters of a rank of pipeline stage ``pipeline_rank`` at the layout of ``settings``.

    Tensor- and context-parallel ranks of a stage hold equally many. The layout must be one that the model accepts
    (``layout_checks.check_layout``).
    """
    parallel, freeze = settings.parallel, settings.frozen_parts
    is_first, is_last = pipeline_rank == 0, pipeline_rank == parallel.pipeline_model_parallel_size - 1
    tensors: list[tuple[int, bool]] = []
    if is_first:
        tensors += _tower(architecture, settings.model, parallel, freeze)
    tensors += _language(architecture, settings.model, parallel, freeze, pipeline_rank)
    if is_last and with_image_decoder:
        share = architecture.vision.unit_dim // parallel.tensor_model_parallel_size
        tensors += [(size, True) for size in _decoder_layer(architecture, parallel)] * settings.warmup.decoder_layers
        tensors += [(share * architecture.text.hidden_size, True), (share, True)]
    adapted = _adapters(architecture, settings, pipeline_rank)
    magnitudes = [projection.magnitudes for projection in adapted]
    tensors += [(size, True) for projection in adapted for size in projection.matrices]
    tensors += [(size, True) for size in magnitudes]
    trainable = [size for size, trains in tensors if trains]
    layers = layers_of_stage(architecture.text.num_hidden_layers, parallel, pipeline_rank)
    return RankParameters(
        trainable=sum(trainable),
        frozen=sum(size for size, trains in tensors if not trains),
        in_fp32=sum(magnitudes),
        fp8=fp8_weights(architecture, settings, language_layers=layers, with_tower=is_first),
    )


def _adapters(architecture: QwenVLArchitecture, settings: TrainSettings, pipeline_rank: int) -> list[AdaptedProjection]:
    """Every adapted projection of a rank."""
    model, parallel, adapter = settings.model, settings.parallel, settings.adapter
    language = language_adapters(language_shape(architecture, model, parallel), adapter)
    found = [*language.values()] * layers_of_stage(architecture.text.num_hidden_layers, parallel, pipeline_rank)
    if pipeline_rank == 0:
        shape = tower_shape(architecture, model, parallel)
        found += [*tower_adapters(architecture, shape, adapter).values()] * architecture.vision.depth
        found += merger_adapters(architecture, shape, adapter).values()
    return found


def _decoder_layer(architecture: QwenVLArchitecture, parallel: ParallelSettings) -> list[int]:
    """Elements of each tensor of a language layer: norms, qkv with bias, projection, gate and up, down."""
    text, tp = architecture.text, parallel.tensor_model_parallel_size
    query, key_value = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    qkv, ffn, hidden = (query + 2 * key_value) // tp, text.intermediate_size // tp, text.hidden_size
    return [hidden, hidden, qkv * hidden, qkv, hidden * query // tp, 2 * ffn * hidden, ffn * hidden]


def _language(
    architecture: QwenVLArchitecture,
    model: ModelSettings,
    parallel: ParallelSettings,
    freeze: FreezeSettings,
    pipeline_rank: int,
) -> list[tuple[int, bool]]:
    text, tp, trains = architecture.text, parallel.tensor_model_parallel_size, not freeze.language
    is_first, is_last = pipeline_rank == 0, pipeline_rank == parallel.pipeline_model_parallel_size - 1
    vocabulary = padded_vocab_size(text.vocab_size, model.make_vocab_size_divisible_by, tp) // tp * text.hidden_size
    layers = layers_of_stage(text.num_hidden_layers, parallel, pipeline_rank)
    tensors = [(size, trains) for size in _decoder_layer(architecture, parallel)] * layers
    if is_first:
        # The mask token's row always trains, and with it the tensor that it lies in.
        tensors.append((vocabulary, True))
    if is_last:
        tensors.append((text.hidden_size, trains))
        if not architecture.tie_word_embeddings:
            tensors.append((vocabulary, trains))
        elif not is_first:
            tensors.append((vocabulary, True))
    return tensors


def _tower(
    architecture: QwenVLArchitecture, model: ModelSettings, parallel: ParallelSettings, freeze: FreezeSettings
) -> list[tuple[int, bool]]:
    vision, tp = architecture.vision, parallel.tensor_model_parallel_size
    hidden, merged = vision.hidden_size, vision.hidden_size * vision.patches_per_unit
    norm = [hidden] if vision.normalization == "RMSNorm" else [hidden, hidden]
    ffn = padded_vision_ffn(architecture, model.vision_ffn_multiple) // tp
    wide = 2 * ffn if vision.gated else ffn
    attention = [3 * hidden // tp * hidden, 3 * hidden // tp, hidden * hidden // tp, hidden]
    layer = [*norm, *attention, *norm, wide * hidden, wide, hidden * ffn, hidden]
    merger = [*norm, merged // tp * merged, merged // tp, vision.out_hidden_size * merged // tp, vision.out_hidden_size]
    return [(size, not freeze.vision) for size in [vision.patch_dim * hidden, *layer * vision.depth]] + [
        (size, not freeze.merger) for size in merger
    ]
