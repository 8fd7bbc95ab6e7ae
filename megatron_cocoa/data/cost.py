"""What a sample costs to compute, so that ranks which wait for each other get equal work.

Counted are the multiplications and additions of a forward pass (a backward pass is twice that, whatever the sample):
linear layers per token and per patch, attention per pair of rows that see each other, the vocabulary per label.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cocoa.architecture import QwenVLArchitecture, TextArchitecture, VisionArchitecture


@dataclass(frozen=True)
class SampleSize:
    """What of a packed sample decides its cost, known before any picture is decoded.

    Args:
        tokens: rows of the language model.
        patches: of each picture.
        pairs: pairs of rows that see each other, ``tokens**2`` for attention in both directions.
        labels: tokens whose loss is taken over the vocabulary, on average.
    """

    tokens: int
    patches: tuple[int, ...] = ()
    pairs: int = 0
    labels: float = 0.0


@dataclass(frozen=True)
class CostModel:
    """FLOPs of a forward pass over a sample.

    Args:
        per_token, per_pair: of all language layers.
        per_label: of the output layer.
        per_patch: of all blocks of the tower, attention inside windows and the merger included.
        per_patch_pair: of the blocks of the tower that see a whole picture.
    """

    per_token: float
    per_pair: float
    per_label: float
    per_patch: float
    per_patch_pair: float

    @classmethod
    def from_architecture(cls, architecture: QwenVLArchitecture) -> CostModel:
        """Counted from the layers' shapes."""
        text, vision = architecture.text, architecture.vision
        layers = text.num_hidden_layers
        full = _full_blocks(vision)
        windowed = vision.depth - full
        window_patches = 0 if vision.window_size is None else (vision.window_size // vision.patch_size) ** 2
        return cls(
            per_token=2.0 * layers * _layer_weights(text),
            per_pair=4.0 * layers * text.num_attention_heads * text.head_dim,
            per_label=2.0 * text.hidden_size * text.vocab_size,
            per_patch=2.0 * (vision.depth * _block_weights(vision) + _ends_per_patch(vision))
            + 4.0 * windowed * window_patches * vision.hidden_size,
            per_patch_pair=4.0 * full * vision.hidden_size,
        )

    def flops(self, size: SampleSize) -> float:
        """Of one packed sample."""
        language = self.per_token * size.tokens + self.per_pair * size.pairs + self.per_label * size.labels
        tower = sum(self.per_patch * patches + self.per_patch_pair * patches**2 for patches in size.patches)
        return language + tower


def _layer_weights(text: TextArchitecture) -> int:
    heads = 2 * text.num_attention_heads + 2 * text.num_key_value_heads
    return text.hidden_size * (heads * text.head_dim + 3 * text.intermediate_size)


def _block_weights(vision: VisionArchitecture) -> int:
    mlp = (3 if vision.gated else 2) * vision.intermediate_size
    return vision.hidden_size * (4 * vision.hidden_size + mlp)


def _full_blocks(vision: VisionArchitecture) -> int:
    return vision.depth if vision.window_size is None else len(vision.fullatt_block_indexes)


def _ends_per_patch(vision: VisionArchitecture) -> float:
    """Patch embedding and merger, whose unit is ``patches_per_unit`` patches."""
    merged = vision.patches_per_unit * vision.hidden_size
    return vision.patch_dim * vision.hidden_size + merged * (merged + vision.out_hidden_size) / vision.patches_per_unit
