"""FP8 under Transformer Engine: what each recipe needs of the chip, of widths and of rows.

Requirements are those of Transformer Engine 2.20 (``pytorch/quantization.py`` and the tensors' ``is_quantizable``). A
product in FP8 is refused by the library, or silently run in BF16, where rows or widths are no whole blocks; here they
are checked before a layer is built, and the tower's rows, whose number follows from the pictures, are padded.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.config import ModelSettings
from megatron_cocoa.model.attention import SequenceContext
from megatron_cocoa.model.segments import SegmentTable

CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""The least compute capability of each recipe; ``mxfp8`` is not there yet on 12.0."""

BLOCK = {None: 1, "delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}
"""Rows and widths are multiples of this: of a kernel's alignment, or of the block that shares a scale."""


AMAX_HISTORY = 1024
"""Updates, one a micro-batch (two with the tower), whose largest value sets the scale of ``delayed``: Transformer
Engine's own default."""


def fp8_multiple(recipe: str | None) -> int:
    """What the rows of a pack must be divisible by on each rank; 1 without FP8."""
    return BLOCK[recipe]


def fp8_fields(model: ModelSettings) -> dict[str, object]:
    """Fields of Megatron's ``TransformerConfig`` for a block that runs in FP8; empty without."""
    if model.fp8 is None:
        return {}
    return dict(
        fp8="hybrid" if model.fp8 != "mxfp8" else "e4m3",
        fp8_recipe=model.fp8,
        fp8_param=model.fp8_param,
        # Of delayed scaling. Megatron's own default, the last step's maximum alone, clips where batches differ.
        fp8_amax_history_len=AMAX_HISTORY,
        fp8_amax_compute_algo="max",
    )


def check_capability(recipe: str, capability: tuple[int, int] | None) -> None:
    """Refuse a recipe that the GPU has no kernels for.

    Raises:
        ValueError: with what was found and which recipe to take.
    """
    found = "no GPU" if capability is None else "compute capability {}.{}".format(*capability)
    if capability is None or capability < CAPABILITY[recipe]:
        needed = "{}.{}".format(*CAPABILITY[recipe])
        raise ValueError(
            f"model.fp8 {recipe} needs compute capability {needed} or more, found {found}: "
            f"choose delayed or tensorwise (8.9 or more), or set model.fp8 to null"
        )
    if recipe == "mxfp8" and capability >= (12, 0):
        raise ValueError(f"model.fp8 mxfp8 has no kernels on {found}: choose tensorwise")


def check_fp8_widths(architecture: QwenVLArchitecture, model: ModelSettings, *, ffn: int, tensor_parallel: int) -> None:
    """Refuse widths that are no whole blocks of the recipe on each rank.

    Args:
        architecture: of the model.
        model: with the recipe.
        ffn: the tower's ffn width after padding, over all ranks.
        tensor_parallel: size of the group that divides the widths.

    Raises:
        ValueError: naming the width, the block and what to change.
    """
    block = fp8_multiple(model.fp8)
    text, vision = architecture.text, architecture.vision
    widths = {
        "hidden_size of the language model": (text.hidden_size, False),
        "heads x head_dim of the language model": (text.num_attention_heads * text.head_dim, True),
        "intermediate_size of the language model": (text.intermediate_size, True),
    }
    if model.fp8_vision:
        widths["hidden_size of the tower"] = (vision.hidden_size, True)
        widths["ffn width of the tower"] = (ffn, True)
    for name, (width, divided) in widths.items():
        local = width // tensor_parallel if divided else width
        if local % block:
            remedy = "set model.vision_ffn_multiple" if name.startswith("ffn") else "choose another recipe or layout"
            if name.startswith("ffn"):
                remedy += f" to {block * tensor_parallel}, or model.fp8_vision to false"
            raise ValueError(
                f"{name}, {width}, gives each of {tensor_parallel} tensor parallel rank(s) {local}, which is not "
                f"divisible by {block} as model.fp8 {model.fp8} needs: {remedy}"
            )


def pad_rows(block: nn.Module, multiple: int) -> None:
    """Let a transformer block see rows in multiples of ``multiple``: zero rows that attend to themselves alone.

    Its caller sees nothing of it: the rows are appended before the block and dropped after it, so outputs and
    gradients of the others are what they were.

    Args:
        block: called with ``hidden_states`` of ``(rows, 1, hidden)`` and ``packed_seq_params``, both by keyword.
        multiple: 1 or more.
    """

    def before(module, args, kwargs):
        rows = kwargs["hidden_states"].shape[0]
        extra = -rows % multiple
        module.rows_before_padding = rows
        if extra:
            kwargs["hidden_states"] = F.pad(kwargs["hidden_states"], (0, 0, 0, 0, 0, extra))
            kwargs["packed_seq_params"] = _padded_context(kwargs["packed_seq_params"], extra)
        return args, kwargs

    def after(module, args, kwargs, output: Tensor) -> Tensor:
        return output[: module.rows_before_padding]

    block.register_forward_pre_hook(before, with_kwargs=True)
    block.register_forward_hook(after, with_kwargs=True)


def _padded_context(context: SequenceContext, extra: int) -> SequenceContext:
    # Layers that share a table share its padded form, and so its plan.
    tables = {id(table): _padded_table(table, extra) for table in _tables(context)}
    layers = {number: tables[id(table)] for number, table in (context.layer_segments or {}).items()}
    pad = lambda x: None if x is None else F.pad(x, (0, 0, 0, extra))  # noqa: E731
    return replace(
        context,
        segments=tables[id(context.segments)],
        layer_segments=layers,
        cos=pad(context.cos),
        sin=pad(context.sin),
    )


def _tables(context: SequenceContext) -> list[SegmentTable]:
    return [context.segments, *(context.layer_segments or {}).values()]


def _padded_table(table: SegmentTable, extra: int) -> SegmentTable:
    rows = [(*row, bool(causal)) for row, causal in zip(table.rows.tolist(), table.causal)]
    end = table.length + extra
    return SegmentTable.from_rows(end, [*rows, (table.length, end, table.length, end, False)])
