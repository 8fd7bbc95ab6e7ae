"""Bytes that one transformer layer keeps between forward and backward, by recompute mode and kernels.

Derived from the tensors that this project's layers save, one by one: the input of each norm, of each linear that
cannot make it again (``model/remade.py``) and of the activation, rotated queries and keys, values, attention's output
and its row statistics. Shape legend: rows of a pack on this rank, h hidden, q and g width of all query and
all key-value heads, f ffn width, t tensor parallel degree; with sequence parallelism whatever lies outside of
attention and MLP has rows / t.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.config import ModelSettings, ParallelSettings, Recompute
from megatron_cocoa.model.layout_checks import padded_vision_ffn


@dataclass(frozen=True)
class Kernels:
    """What differs between implementations of the same layer.

    remakes_inputs: linears behind a norm, an activation or attention make their input again (this project's local
        layers); Transformer Engine's keep it.
    gradient_in_place: an activation's gradient is written over its input (on a CPU).
    releases_outputs: a pipeline stage frees what it has sent on (Megatron's ``deallocate_pipeline_outputs``).
    copies_reductions: a reduce-scatter works on a copy of its input (gloo; NCCL writes where it reads).
    """

    remakes_inputs: bool
    gradient_in_place: bool
    releases_outputs: bool
    copies_reductions: bool


GPU_KERNELS = Kernels(remakes_inputs=False, gradient_in_place=False, releases_outputs=True, copies_reductions=False)
CPU_KERNELS = Kernels(remakes_inputs=True, gradient_in_place=True, releases_outputs=False, copies_reductions=True)


@dataclass(frozen=True)
class LayerShape:
    """One layer's widths, whole, and how it is cut."""

    hidden: int
    query: int
    key_value: int
    ffn: int
    heads: int
    gated: bool
    rms_norm: bool
    tensor_parallel: int
    sequence_parallel: bool
    context_parallel: int
    element: int
    """Bytes of an activation."""


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer for one micro-batch.

    saved:   from forward to backward.
    rerun:   what its recomputation saves once more while it is differentiated.
    working: gradients and temporaries at the peak of its backward.
    """

    saved: int
    rerun: int
    working: int


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
        rms_norm=True,
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
        rms_norm=vision.normalization == "RMSNorm",
        tensor_parallel=parallel.tensor_model_parallel_size,
        sequence_parallel=False,
        context_parallel=1,
        element=element_size(model),
    )


def element_size(model: ModelSettings) -> int:
    """Bytes of a parameter or activation."""
    return 2 if model.dtype == "bf16" else 4


def layer_memory(
    shape: LayerShape,
    rows: int,
    kernels: Kernels,
    *,
    recompute: Recompute,
    layers_per_block: int = 1,
    trains: bool = True,
    read: int | None = None,
) -> LayerMemory:
    """Memory of one layer.

    Args:
        shape: widths and degrees.
        rows: of the pack on this rank (a context-parallel share).
        kernels: at hand.
        recompute: of this layer.
        layers_per_block: layers that one recomputed block holds under ``full``.
        trains: False where its weights are frozen and gradients pass through it: linears then keep no input.
        read: rows with which a last layer goes on after attention (``model/layer.py``); None for all.
    """
    after = rows if read is None else read
    residual, residual_after = (_rows_outside(shape, n) * shape.hidden * shape.element for n in (rows, after))
    output = after * shape.query * shape.element // shape.tensor_parallel
    attention = _attention(shape, rows)
    if trains and (shape.context_parallel > 1 or read is not None):
        # The rows that the output projection reads are then others than attention's.
        attention += output
    outside, mlp = norm_saved(shape, rows) + norm_saved(shape, after), _mlp_input(shape, after)
    if trains and not kernels.remakes_inputs:
        # The inputs that the weights' gradients need.
        outside += residual + residual_after
        mlp += after * shape.ffn * shape.element // shape.tensor_parallel
    rest = outside + mlp
    everything = rest + attention
    working = _working(shape, after, kernels)
    if recompute == "none":
        return LayerMemory(everything, 0, working)
    if recompute == "mlp":
        return LayerMemory(outside + attention, mlp, working)
    if recompute == "full":
        return LayerMemory(-(-residual // layers_per_block), layers_per_block * everything, working)
    kept = _attention_inputs(shape, rows) + output
    return LayerMemory(rest + kept, attention, working)


def norm_saved(shape: LayerShape, rows: int) -> int:
    """Bytes that a norm keeps: its input and a number a row."""
    return _rows_outside(shape, rows) * (shape.hidden * shape.element + 4)


def _rows_outside(shape: LayerShape, rows: int) -> int:
    return -(-rows // shape.tensor_parallel) if shape.sequence_parallel else rows


def _attention(shape: LayerShape, rows: int) -> int:
    """Values, rotated keys and queries, output, row statistics."""
    width = 2 * shape.key_value + 2 * shape.query
    return rows * (width * shape.element + 4 * shape.heads) // shape.tensor_parallel


def _attention_inputs(shape: LayerShape, rows: int) -> int:
    """What checkpointed core attention keeps beside its output: the projection, and queries where they are a copy."""
    copied = shape.query if shape.query != shape.key_value else 0
    width = shape.query + 2 * shape.key_value + copied
    return rows * width * shape.element // shape.tensor_parallel


def _mlp_input(shape: LayerShape, rows: int) -> int:
    """Of the activation: twice as wide as the ffn where gated."""
    return rows * (1 + shape.gated) * shape.ffn * shape.element // shape.tensor_parallel


def _working(shape: LayerShape, rows: int, kernels: Kernels) -> int:
    """At the activation's backward: the gradients on both sides and, unless its output is gone by then, a temporary;
    or at a weight's gradient, before it is added to the FP32 buffer.

    The residual's gradient and the branch's lie beside it.
    """
    width = shape.ffn * shape.element // shape.tensor_parallel
    wide = 2 if shape.gated else 1
    activation = rows * width * (1 if kernels.gradient_in_place else wide + 1)
    first = width * wide * shape.hidden - (0 if kernels.remakes_inputs else rows * width)
    second = width * shape.hidden + rows * width * (1 + kernels.remakes_inputs)
    return max(activation, first, second) + 2 * _rows_outside(shape, rows) * shape.hidden * shape.element
