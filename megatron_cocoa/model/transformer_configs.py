"""Megatron ``TransformerConfig``s of tower, merger, language model and image decoder."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal
from torch.nn import functional as F

from megatron_cocoa.architecture import MERGER_EPSILON, QwenVLArchitecture
from megatron_cocoa.config import ModelSettings, ParallelSettings, Recompute, RecomputeSettings
from megatron_cocoa.model.activations import gelu, quick_gelu
from megatron_cocoa.model.fp8 import fp8_fields
from megatron_cocoa.model.layout_checks import check_layout, padded_vision_ffn
from megatron_cocoa.parallel import device

INITIALIZER_RANGE = 0.02


@dataclass(frozen=True)
class ModelConfigs:
    """One config per part; ``language`` is also the one that Megatron's schedules read."""

    vision: TransformerConfig
    projection: TransformerConfig
    language: TransformerConfig
    image_decoder: TransformerConfig


def build_configs(
    architecture: QwenVLArchitecture,
    *,
    model: ModelSettings,
    parallel: ParallelSettings,
    recompute: RecomputeSettings,
    fixed_sequence_length: bool = False,
    decoder_layers: int = 1,
) -> ModelConfigs:
    """Configs for an architecture at a layout.

    Args:
        architecture: tower and language model.
        model: dtype, ffn padding, FP8.
        parallel: degrees.
        recompute: activation recompute of tower and language model.
        fixed_sequence_length: all packs of a step have one length, so that pipeline stages need not exchange shapes.
        decoder_layers: of the image decoder.

    Raises:
        ValueError: if heads, ffn widths or layers cannot be divided as asked.
    """
    check_layout(architecture, model=model, parallel=parallel, recompute=recompute)
    common = _common(model, parallel)
    tower = {**common, **_recompute(recompute.vision, recompute.vision_num_layers)}
    if model.fp8_vision:
        tower |= fp8_fields(model)
    return ModelConfigs(
        vision=_vision(architecture, model, tower),
        projection=_projection(architecture, common),
        language=_language(architecture, model, parallel, recompute, common, fixed_sequence_length),
        image_decoder=_image_decoder(architecture, parallel, common, decoder_layers),
    )


def without_sequence_parallel(config: TransformerConfig) -> TransformerConfig:
    """``config`` for a head whose input rows are whole on every tensor-parallel rank."""
    whole = copy.copy(config)
    whole.sequence_parallel = False
    return whole


def _common(model: ModelSettings, parallel: ParallelSettings) -> dict:
    dtype = torch.bfloat16 if model.dtype == "bf16" else torch.float32
    on_gpu = device.has_gpu()
    return dict(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=model.dtype == "bf16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,
        init_method=init_method_normal(INITIALIZER_RANGE),
        output_layer_init_method=init_method_normal(INITIALIZER_RANGE),
        gradient_accumulation_fusion=False,
        # Interleaved stages send while they go on computing. Megatron-Core 0.16 would free what is still on its way,
        # and 0.19 waits for it instead.
        deallocate_pipeline_outputs=on_gpu and parallel.virtual_pipeline_model_parallel_size is None,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def _recompute(mode: Recompute, num_layers: int | None) -> dict:
    if mode == "none":
        return {}
    if mode == "full":
        return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=num_layers or 1)
    # How many layers do so under ``mlp`` is no field of Megatron's: model/layer.py counts them.
    return dict(recompute_granularity="selective", recompute_modules=["mlp" if mode == "mlp" else "core_attn"])


def _vision(architecture: QwenVLArchitecture, model: ModelSettings, common: dict) -> TransformerConfig:
    vision = architecture.vision
    return TransformerConfig(
        **common,
        num_layers=vision.depth,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_heads,
        num_query_groups=vision.num_heads,
        kv_channels=vision.hidden_size // vision.num_heads,
        ffn_hidden_size=padded_vision_ffn(architecture, model.vision_ffn_multiple),
        gated_linear_unit=vision.gated,
        use_te_activation_func=vision.gated,
        activation_func=F.silu if vision.activation == "silu" else quick_gelu,
        normalization=vision.normalization,
        layernorm_epsilon=MERGER_EPSILON,
        add_bias_linear=True,
        add_qkv_bias=True,
    )


def _projection(architecture: QwenVLArchitecture, common: dict) -> TransformerConfig:
    vision = architecture.vision
    return TransformerConfig(
        **common,
        num_layers=1,
        num_attention_heads=vision.num_heads,
        kv_channels=1,
        hidden_size=vision.out_hidden_size,
        ffn_hidden_size=vision.hidden_size * vision.patches_per_unit,
        gated_linear_unit=False,
        activation_func=gelu,
        add_bias_linear=True,
    )


def _decoder_layer(architecture: QwenVLArchitecture, parallel: ParallelSettings) -> dict:
    text = architecture.text
    return dict(
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=text.head_dim,
        ffn_hidden_size=text.intermediate_size,
        gated_linear_unit=True,
        # The slot for an activation module: model/activations.py fills it, whatever the layers' implementation.
        use_te_activation_func=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=True,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
    )


def _language(
    architecture: QwenVLArchitecture,
    model: ModelSettings,
    parallel: ParallelSettings,
    recompute: RecomputeSettings,
    common: dict,
    fixed_sequence_length: bool,
) -> TransformerConfig:
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return TransformerConfig(
        **common,
        **_decoder_layer(architecture, parallel),
        **_recompute(recompute.language, recompute.language_num_layers),
        **fp8_fields(model),
        num_layers=architecture.text.num_hidden_layers,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        # Counts are global and known before the forward pass: each loss term is divided by its own.
        calculate_per_token_loss=True,
        variable_seq_lengths=parallel.pipeline_model_parallel_size > 1 and not fixed_sequence_length,
        # Megatron refuses variable lengths with its default dispatcher, experts or not.
        moe_token_dispatcher_type="alltoall",
        # Interleaved stages with the default batched exchange train silently wrong.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
    )


def _image_decoder(
    architecture: QwenVLArchitecture, parallel: ParallelSettings, common: dict, num_layers: int
) -> TransformerConfig:
    return TransformerConfig(**common, **_decoder_layer(architecture, parallel), num_layers=num_layers)
