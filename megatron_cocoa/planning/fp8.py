"""Bytes of weights whose products run in FP8: what Transformer Engine keeps of each beside, or instead of, BF16.

A product reads its operands along the dimension that it sums over, so the forward pass and the gradient of the input
need a weight by rows and by columns. Computed from the source of Transformer Engine 2.20.2 (``pytorch/...``):

- Without ``model.fp8_param`` a linear keeps both copies for as long as it lives, not for one step: Megatron tells it
  which micro-batch is the first (``TELinear.forward``), so it caches them in ``_fp8_workspaces`` (``module/linear.py``
  2443 and 2568, ``module/layernorm_linear.py`` 1763 and 1823, ``module/base.py`` ``quantize_weight``). The copy by
  columns is made where the input needs a gradient (``module/linear.py`` 563), behind a fused norm always
  (``module/layernorm_linear.py`` 348).
- With it the parameter is the two copies, made when it is constructed (``module/base.py`` 1848). Megatron's optimizer
  drops the one by columns and makes it again after gathering (``tensor/utils.py`` ``post_all_gather_processing``).
- Scales are a number a tensor (``tensor/float8_tensor.py`` 411), one byte a block of 32 (``tensor/mxfp8_tensor.py``
  139), or FP32 a square of 128 (``tensor/float8_blockwise_tensor.py`` 162).

This is a Hopper's: Blackwell reads a copy by rows both ways (``is_non_tn_fp8_gemm_supported``) and keeps no other
under ``delayed`` and ``tensorwise``. Not counted: what is rounded up in a tensor of scales, and the history of
``delayed``, 20 KiB a linear. Activations are counted in BF16 as without FP8, which is more than they take.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.config import TrainSettings
from megatron_cocoa.planning.shapes import LayerShape, language_shape, tower_shape

COPY = {"delayed": 1.0, "tensorwise": 1.0, "mxfp8": 1 + 1 / 32, "blockwise": 1 + 4 / 128**2}
"""Bytes of an element of a copy, its share of a scale included, by recipe."""


@dataclass(frozen=True)
class Fp8Weights:
    """Elements of weights on one rank by what is kept of them in FP8.

    by_rows:    of all that run in FP8.
    by_columns: of those that have the other copy too.
    """

    by_rows: int = 0
    by_columns: int = 0

    def copies(self, recipe: str | None) -> int:
        """Bytes of both copies."""
        return round((self.by_rows + self.by_columns) * COPY[recipe]) if recipe else 0


def fp8_weights(
    architecture: QwenVLArchitecture, settings: TrainSettings, *, language_layers: int, with_tower: bool
) -> Fp8Weights:
    """The weights in FP8 of a rank with so many language layers, and with the tower if it lies there."""
    model, parallel = settings.model, settings.parallel
    if model.fp8 is None:
        return Fp8Weights()
    language = language_layers * sum(_layer_elements(language_shape(architecture, model, parallel)))
    if not (with_tower and model.fp8_vision):
        return Fp8Weights(language, language)
    depth = architecture.vision.depth
    behind_norms, others = (depth * size for size in _layer_elements(tower_shape(architecture, model, parallel)))
    tower = columns = behind_norms + others
    is_adapted = settings.adapter.is_used
    if not model.fp8_param and settings.frozen_parts.vision and not (is_adapted and settings.adapter.vision_targets):
        # No gradient passes through. A projection with a norm fused into it, as without adapters, does not ask.
        columns = 0 if is_adapted else behind_norms
    return Fp8Weights(language + tower, language + columns)


def _layer_elements(shape: LayerShape) -> tuple[int, int]:
    """Of one layer's weights on one rank: the two projections behind norms, and the other two."""
    behind_norms = shape.query + 2 * shape.key_value + (1 + shape.gated) * shape.ffn
    return (
        shape.hidden * behind_norms // shape.tensor_parallel,
        shape.hidden * (shape.query + shape.ffn) // shape.tensor_parallel,
    )
