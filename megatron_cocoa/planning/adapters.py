"""What LoRA and DoRA adapters hold and keep on one rank, counted as ``model/linear_adapter.py`` makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.config import AdapterSettings
from megatron_cocoa.model.adapter_targets import LANGUAGE_PROJECTIONS, MERGER_PROJECTIONS, tower_projections
from megatron_cocoa.planning.shapes import LayerShape


@dataclass(frozen=True)
class AdaptedProjection:
    """The adapters of one projection.

    inputs, outputs: features of the projection on this rank.
    num_parts:       targeted Hugging Face modules in it.
    """

    inputs: int
    outputs: int
    num_parts: int
    settings: AdapterSettings

    @property
    def matrices(self) -> list[int]:
        """Elements of A and B, in the model's dtype."""
        return [self.num_parts * self.settings.rank * self.inputs, self.settings.rank * self.outputs]

    @property
    def magnitudes(self) -> int:
        """Elements of DoRA's magnitudes, which are FP32."""
        return self.outputs if self.settings.kind == "dora" else 0

    @property
    def is_dropping(self) -> bool:
        return self.settings.dropout > 0

    def kept_input(self, rows: int, element: int, mask_element: int) -> int:
        """Bytes of the input that the product with A keeps, with dropout's mask beside it.

        Args:
            rows: of the input on this rank.
            element: bytes of an activation.
            mask_element: bytes of an entry of dropout's mask.
        """
        return rows * self.inputs * (element + (mask_element if self.is_dropping else 0))

    def kept_output(self, rows: int, element: int) -> int:
        """Bytes that the products with B keep, and DoRA's: the plain product and the update, to scale them again.

        Args:
            rows: of the output on this rank.
            element: bytes of an activation.
        """
        low = self.num_parts * self.settings.rank * (rows + self.outputs)
        return (low + 2 * rows * self.outputs * (self.settings.kind == "dora")) * element

    @property
    def temporaries(self) -> int:
        """Tensors as wide as the output that the sum of product and update takes beside those that are kept.

        The product and the update; DoRA keeps the latter, and adds two scaled tensors one after the other.
        """
        if self.settings.kind == "lora":
            return 2
        return 3 if self.is_dropping else 2

    @property
    def input_gradients(self) -> int:
        """Gradients as wide as the input that meet there: DoRA's two products read what dropout left."""
        return 2 if self.settings.kind == "dora" and self.is_dropping else 1


def language_adapters(shape: LayerShape, adapter: AdapterSettings) -> dict[str, AdaptedProjection]:
    """Of one language layer, by the projection's name; empty without adapters."""
    return _of_layer(shape, LANGUAGE_PROJECTIONS, adapter.language_targets, adapter)


def tower_adapters(
    architecture: QwenVLArchitecture, shape: LayerShape, adapter: AdapterSettings
) -> dict[str, AdaptedProjection]:
    """Of one tower layer."""
    return _of_layer(shape, tower_projections(architecture.vision), adapter.vision_targets, adapter)


def merger_adapters(
    architecture: QwenVLArchitecture, shape: LayerShape, adapter: AdapterSettings
) -> dict[str, AdaptedProjection]:
    """Of the merger; ``shape`` is the tower's."""
    vision = architecture.vision
    wide = vision.hidden_size * vision.patches_per_unit
    features = {
        "linear_fc1": (wide, wide // shape.tensor_parallel),
        "linear_fc2": (wide // shape.tensor_parallel, vision.out_hidden_size),
    }
    return _adapted(features, MERGER_PROJECTIONS, adapter.vision_targets, adapter)


def _of_layer(
    shape: LayerShape, projections: Mapping[str, Sequence[str]], targets: Sequence[str], adapter: AdapterSettings
) -> dict[str, AdaptedProjection]:
    tp, ffn = shape.tensor_parallel, shape.ffn // shape.tensor_parallel
    features = {
        "linear_qkv": (shape.hidden, (shape.query + 2 * shape.key_value) // tp),
        "linear_proj": (shape.query // tp, shape.hidden),
        "linear_fc1": (shape.hidden, ffn * (1 + shape.gated)),
        "linear_fc2": (ffn, shape.hidden),
    }
    return _adapted(features, projections, targets, adapter)


def _adapted(
    features: Mapping[str, tuple[int, int]],
    projections: Mapping[str, Sequence[str]],
    targets: Sequence[str],
    adapter: AdapterSettings,
) -> dict[str, AdaptedProjection]:
    if not adapter.is_used:
        return {}
    parts = {name: sum(module in targets for module in modules) for name, modules in projections.items()}
    return {name: AdaptedProjection(*features[name], number, adapter) for name, number in parts.items() if number}
