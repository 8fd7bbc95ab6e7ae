"""Widths of the model's layers and how a layout cuts them: what parameters and activations are counted from."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.config import ModelSettings, ParallelSettings
from megatron_cocoa.model.layout_checks import padded_vision_ffn


@dataclass(frozen=True)
class LayerShape:
    """One layer's widths, whole, and how it is cut."""

    hidden: int
    query: int
    key_value: int
    ffn: int
    heads: int
    gated: bool
    tensor_parallel: int
    sequence_parallel: bool
    context_parallel: int
    element: int
    """Bytes of an activation."""

    def rows_outside(self, rows: int) -> int:
        """Those of ``rows`` that lie on this rank outside of attention and MLP."""
        return -(-rows // self.tensor_parallel) if self.sequence_parallel else rows


def language_shape(architecture: QwenVLArchitecture, model: ModelSettings, parallel: ParallelSettings) -> LayerShape:
    """Of a language layer, and of the image decoder's."""
    text = architecture.text
    return LayerShape(
        hidden=text.hidden_size,
        query=text.num_attention_heads * text.head_dim,
        key_value=text.num_key_value_heads * text.head_dim,
        ffn=text.intermediate_size,
        heads=text.num_attention_heads,
        gated=True,
        tensor_parallel=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        context_parallel=parallel.context_parallel_size,
        element=element_size(model),
    )


def tower_shape(architecture: QwenVLArchitecture, model: ModelSettings, parallel: ParallelSettings) -> LayerShape:
    """Of a tower layer: never sequence-parallel, and whole pictures under context parallelism."""
    vision = architecture.vision
    return LayerShape(
        hidden=vision.hidden_size,
        query=vision.hidden_size,
        key_value=vision.hidden_size,
        ffn=padded_vision_ffn(architecture, model.vision_ffn_multiple),
        heads=vision.num_heads,
        gated=vision.gated,
        tensor_parallel=parallel.tensor_model_parallel_size,
        sequence_parallel=False,
        context_parallel=1,
        element=element_size(model),
    )


def element_size(model: ModelSettings) -> int:
    """Bytes of a parameter or activation."""
    return 2 if model.dtype == "bf16" else 4
