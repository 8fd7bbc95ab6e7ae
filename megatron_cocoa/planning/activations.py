"""Bytes that one transformer layer keeps between forward and backward, by recompute mode and kernels.

Derived from the tensors that this project's layers save, one by one: the input of each norm, of each linear that
cannot make it again (``model/remade.py``) and of the activation, rotated queries and keys, values, attention's output
and its row statistics. Shape legend: rows of a pack on this rank, h hidden, q and g width of all query and
all key-value heads, f ffn width, t tensor parallel degree; with sequence parallelism whatever lies outside of
attention and MLP has rows / t.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_cocoa.config import Recompute
from megatron_cocoa.planning.adapters import AdaptedProjection
from megatron_cocoa.planning.shapes import LayerShape


@dataclass(frozen=True)
class Kernels:
    """What differs between implementations of the same layer.

    remakes_inputs: linears behind a norm, an activation or attention make their input again (this project's local
        layers); Transformer Engine's keep it.
    gradient_in_place: an activation's gradient is written over its input (on a CPU).
    releases_outputs: a pipeline stage frees what it has sent on (Megatron's ``deallocate_pipeline_outputs``), unless
        stages are interleaved.
    copies_reductions: a reduce-scatter works on a copy of its input (gloo; NCCL writes where it reads).
    bool_masks: dropout keeps a byte an entry; else its mask is as wide as what it drops (on a CPU).
    """

    remakes_inputs: bool
    gradient_in_place: bool
    releases_outputs: bool
    copies_reductions: bool
    bool_masks: bool

    def mask_element(self, element: int) -> int:
        """Bytes of an entry of dropout's mask over activations of ``element`` bytes."""
        return 1 if self.bool_masks else element


GPU_KERNELS = Kernels(
    remakes_inputs=False, gradient_in_place=False, releases_outputs=True, copies_reductions=False, bool_masks=True
)
CPU_KERNELS = Kernels(
    remakes_inputs=True, gradient_in_place=True, releases_outputs=False, copies_reductions=True, bool_masks=False
)


NO_ADAPTERS: Mapping[str, AdaptedProjection] = {}


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


def layer_memory(
    shape: LayerShape,
    rows: int,
    kernels: Kernels,
    *,
    recompute: Recompute,
    layers_per_block: int = 1,
    trains: bool = True,
    read: int | None = None,
    adapters: Mapping[str, AdaptedProjection] = NO_ADAPTERS,
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
        adapters: beside its projections, by their name; its own weights are frozen then.
    """
    after = rows if read is None else read
    trains = trains and not adapters
    residual, residual_after = (shape.rows_outside(n) * shape.hidden * shape.element for n in (rows, after))
    output = after * shape.query * shape.element // shape.tensor_parallel
    attention = _attention(shape, rows)
    is_copied = shape.context_parallel > 1 or read is not None
    if trains and is_copied:
        # The rows that the output projection reads are then others than attention's.
        attention += output
    outside, mlp = norm_saved(shape, rows) + norm_saved(shape, after), _mlp_input(shape, after)
    if trains and not kernels.remakes_inputs:
        # The inputs that the weights' gradients need.
        outside += residual + residual_after
        mlp += after * shape.ffn * shape.element // shape.tensor_parallel
    kept = _kept_by_adapters(shape, rows, after, kernels, adapters)
    if "linear_proj" in adapters and not adapters["linear_proj"].is_dropping:
        if recompute == "selective" or not (is_copied or kernels.remakes_inputs):
            # What the checkpoint, or the kernel, keeps already.
            kept["linear_proj"] -= output
    outside += kept["linear_qkv"] + kept["linear_proj"]
    mlp += kept["linear_fc1"] + kept["linear_fc2"]
    rest = outside + mlp
    everything = rest + attention
    working = _working(shape, after, kernels, trains, adapters, kept["linear_fc2"])
    if recompute == "none":
        return LayerMemory(everything, 0, working)
    if recompute == "mlp":
        # Beside adapters Megatron recomputes the whole MLP, and keeps its input.
        return LayerMemory(outside + attention + (residual_after if adapters else 0), mlp, working)
    if recompute == "full":
        return LayerMemory(-(-residual // layers_per_block), layers_per_block * everything, working)
    inputs = _attention_inputs(shape, rows) + output
    return LayerMemory(rest + inputs, attention, working)


def _kept_by_adapters(
    shape: LayerShape, rows: int, after: int, kernels: Kernels, adapters: Mapping[str, AdaptedProjection]
) -> dict[str, int]:
    """Bytes by projection: its input, or a copy after dropout, and what B's product and DoRA need."""
    outside, outside_after = shape.rows_outside(rows), shape.rows_outside(after)
    of_rows = {
        "linear_qkv": (outside, rows),
        "linear_proj": (after, outside_after),
        "linear_fc1": (outside_after, after),
        "linear_fc2": (after, outside_after),
    }
    mask = kernels.mask_element(shape.element)
    kept = dict.fromkeys(of_rows, 0)
    for name, adapted in adapters.items():
        read, written = of_rows[name]
        kept[name] = adapted.kept_input(read, shape.element, mask) + adapted.kept_output(written, shape.element)
    return kept


def norm_saved(shape: LayerShape, rows: int) -> int:
    """Bytes that a norm keeps: its input and a number a row."""
    return shape.rows_outside(rows) * (shape.hidden * shape.element + 4)


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


def _working(
    shape: LayerShape,
    rows: int,
    kernels: Kernels,
    trains: bool,
    adapters: Mapping[str, AdaptedProjection],
    kept_after: int,
) -> int:
    """At the activation's backward: the gradients on both sides and, unless its output is gone by then, a temporary;
    or at a weight's gradient, before it is added to the FP32 buffer; or where an adapter's product is added to the
    first projection's, in the forward pass, before the second one's adapter keeps its share (``kept_after``).

    The residual's gradient and the branch's lie beside it.
    """
    width = shape.ffn * shape.element // shape.tensor_parallel
    wide = 2 if shape.gated else 1
    moments = [rows * width * (1 if kernels.gradient_in_place else wide + 1) - kept_after]
    if trains:
        moments.append(width * wide * shape.hidden - (0 if kernels.remakes_inputs else rows * width))
        moments.append(width * shape.hidden + rows * width * (1 + kernels.remakes_inputs))
    if "linear_fc1" in adapters:
        moments.append(rows * width * wide * adapters["linear_fc1"].temporaries - kept_after)
    if "linear_fc2" in adapters:
        moments.append(rows * width * adapters["linear_fc2"].input_gradients)
    return max(moments) + 2 * shape.rows_outside(rows) * shape.hidden * shape.element
