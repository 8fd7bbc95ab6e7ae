"""Floating-point operations of a training step, counted from the layout of its packs: what utilisation divides by.

*Useful* operations are those that the mathematics of the step needs: the multiply-adds of linear layers and of
attention over the query-key pairs that the mask lets through, forward once, and backward where something trains.
They give model FLOP/s utilisation (MFU, Chowdhery et al., arXiv 2204.02311, appendix B). *Hardware* operations add
what an implementation chose to repeat or to pad: recomputed layers, the second forward pass of gradient caching, the
tail of a pack. They give hardware utilisation (HFU).

The last layer's keys and values are needed at every row, its output where something reads it: so many rows of its
output projection and MLP count. Its queries and scores, and adapters, count for all rows.

Not counted in either: norms, activations, rotary positions, softmax, optimizer, the similarity matrix of the
contrastive loss, what a kernel recomputes inside (flash attention's scores), and DoRA's second product of each frozen
weight with the input after dropout: utilisation under DoRA with dropout is understated. Vocabulary and ffn padding,
the padding of attention buckets and of the rows read, the image decoder's pass over a tail, and the tower's over an
empty pack are work, but not useful work.

For several packs, on one rank or over ranks, sum the ``Workload``, then count once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_cocoa.architecture import QwenVLArchitecture, VisionArchitecture
from megatron_cocoa.config import FreezeSettings, Recompute, RecomputeSettings
from megatron_cocoa.model.workload import Workload


@dataclass(frozen=True)
class PartFlops:
    """Forward operations of one part, and what its backward pass computes.

    linear, attention: forward operations.
    input_gradient:    gradients flow through it, which costs the linears once more and the attention twice more.
    weight_gradient:   its own weights train, which costs the linears once more.
    repeated:          the mode of recompute.
    recomputed_mlp:    forward operations that are repeated under mode ``mlp``.
    """

    name: str
    linear: int
    attention: int = 0
    input_gradient: bool = field(kw_only=True)
    weight_gradient: bool = field(kw_only=True)
    repeated: Recompute = "none"
    recomputed_mlp: int = 0

    @property
    def forward(self) -> int:
        return self.linear + self.attention

    @property
    def backward(self) -> int:
        linear = self.linear * (self.input_gradient + self.weight_gradient)
        return linear + 2 * self.attention * self.input_gradient

    @property
    def recomputed(self) -> int:
        if not self.input_gradient:
            return 0
        of_mode = {
            "none": 0,
            "mlp": self.recomputed_mlp,
            "selective": self.attention,
            "full": self.forward,
        }
        return of_mode[self.repeated]


@dataclass(frozen=True)
class StepFlops:
    """Operations of a step by part; ``useful`` is the numerator of MFU, ``hardware`` that of HFU."""

    parts: tuple[PartFlops, ...]
    tail: tuple[PartFlops, ...] = ()
    extra_forward_passes: float = 0

    @property
    def forward(self) -> int:
        """Useful operations of one forward pass."""
        return sum(part.forward for part in self.parts)

    @property
    def useful(self) -> int:
        return sum(part.forward + part.backward for part in self.parts)

    @property
    def hardware(self) -> int:
        every = self.parts + self.tail
        once = sum(part.forward + part.backward + part.recomputed for part in every)
        return once + round(self.extra_forward_passes * sum(part.forward for part in every))


def step_flops(
    architecture: QwenVLArchitecture,
    workload: Workload,
    *,
    freeze: FreezeSettings = FreezeSettings(),
    recompute: RecomputeSettings = RecomputeSettings(),
    repeats_whole_mlps: bool = False,
    pipeline_stages: int = 1,
    extra_forward_passes: float = 0,
    language_adapter_parameters: int = 0,
    vision_adapter_parameters: int = 0,
    decoder_layers: int = 1,
) -> StepFlops:
    """Operations of forward and backward over a workload.

    A linear map costs ``2 * rows * inputs * outputs``; its backward as much for the gradient of its input and as
    much again for that of its weight. Attention costs ``4 * pairs * heads * head_dim``, its backward twice that.

    Args:
        architecture: the published shapes, without any padding.
        workload: of one or many packs, on one or all ranks.
        freeze: frozen parts have no weight gradient; a frozen tower has no gradient at all, since nothing below it
            trains. Gradients always flow through the language model, because the mask token's row trains.
        recompute: counts only towards ``hardware``.
        repeats_whole_mlps: recompute ``mlp`` repeats all of an MLP, not only its first projection
            (see ``model/layer.py``).
        pipeline_stages: parts of the language model (virtual chunks included), each of which counts its recomputed
            MLPs by itself. Adapters in them are not counted again.
        extra_forward_passes: share of the workload that runs forward once more without gradients (gradient caching).
        language_adapter_parameters, vision_adapter_parameters: elements of low-rank adapters (whole model, not
            sharded) on the linears of all layers; each costs two operations a row, and they train.
        decoder_layers: of the image decoder.
    """
    vision_trains = not freeze.vision or vision_adapter_parameters > 0
    text = architecture.text
    tower = _tower(architecture.vision, workload, freeze, recompute, vision_trains, repeats_whole_mlps)
    adapters = (
        _adapters("vision_adapters", workload.patches * vision_adapter_parameters, recompute.vision),
        _adapters("language_adapters", workload.tokens * language_adapter_parameters, recompute.language),
    )
    number = text.num_hidden_layers
    num_recomputed = recompute.mlp_layers("language", number, stages=pipeline_stages)
    repeated_maps = (3 if repeats_whole_mlps else 2) * text.hidden_size * text.intermediate_size

    def language_layers(name: str, rows: int, pairs: int, read: int) -> PartFlops:
        linear, attention = _decoder_layers(architecture, number, rows, pairs, read)
        # The last layer's MLP runs on the rows read alone, if it is among those that are recomputed.
        recomputed_rows = num_recomputed * rows - (rows - read if num_recomputed == number else 0)
        return PartFlops(
            name,
            linear=linear,
            attention=attention,
            input_gradient=True,
            weight_gradient=not freeze.language,
            repeated=recompute.language,
            recomputed_mlp=2 * recomputed_rows * repeated_maps,
        )

    return StepFlops(
        parts=(
            *tower,
            language_layers("language_layers", workload.tokens, workload.pairs, workload.read_rows),
            *(part for part in adapters if part.linear),
            PartFlops(
                "token_head",
                linear=2 * workload.supervised * text.hidden_size * text.vocab_size,
                input_gradient=True,
                weight_gradient=not freeze.language,
            ),
            _image_decoder(architecture, workload, decoder_layers),
        ),
        tail=(language_layers("tail", workload.tail_tokens, workload.tail_pairs, workload.tail_read_rows),),
        extra_forward_passes=extra_forward_passes,
    )


def _adapters(name: str, products: int, repeated: Recompute) -> PartFlops:
    return PartFlops(name, linear=2 * products, input_gradient=True, weight_gradient=True, repeated=repeated)


def _image_decoder(architecture: QwenVLArchitecture, workload: Workload, num_layers: int) -> PartFlops:
    linear, attention = _decoder_layers(
        architecture, num_layers, workload.decoder_tokens, workload.decoder_pairs, workload.decoder_read_rows
    )
    unit_dim = architecture.vision.unit_dim
    pixel_head = 2 * workload.masked_units * architecture.text.hidden_size * unit_dim
    return PartFlops(
        "image_decoder", linear=linear + pixel_head, attention=attention, input_gradient=True, weight_gradient=True
    )


def _tower(
    vision: VisionArchitecture,
    workload: Workload,
    freeze: FreezeSettings,
    recompute: RecomputeSettings,
    trains: bool,
    repeats_whole_mlps: bool,
) -> tuple[PartFlops, ...]:
    hidden, patches = vision.hidden_size, workload.patches
    one_map = hidden * vision.intermediate_size
    ffn = (3 if vision.gated else 2) * one_map
    repeated_maps = ffn if repeats_whole_mlps else ffn - one_map
    num_full = len(vision.fullatt_block_indexes)
    pairs = num_full * workload.frame_pairs + (vision.depth - num_full) * workload.window_pairs
    merged = hidden * vision.patches_per_unit
    merger = 2 * (patches // vision.patches_per_unit) * merged * (merged + vision.out_hidden_size)
    return (
        PartFlops(
            "patch_embed",
            linear=2 * patches * vision.patch_dim * hidden,
            input_gradient=False,
            weight_gradient=not freeze.vision,
        ),
        PartFlops(
            "vision_layers",
            linear=2 * patches * vision.depth * (4 * hidden * hidden + ffn),
            attention=4 * pairs * hidden,
            input_gradient=trains,
            weight_gradient=not freeze.vision,
            repeated=recompute.vision,
            recomputed_mlp=2 * patches * recompute.mlp_layers("vision", vision.depth) * repeated_maps,
        ),
        # The merger's norm trains with it, so gradients reach its first linear's input wherever it trains.
        PartFlops(
            "merger",
            linear=merger,
            input_gradient=trains or not freeze.merger,
            weight_gradient=not freeze.merger,
        ),
    )


def _decoder_layers(
    architecture: QwenVLArchitecture, number: int, tokens: int, pairs: int, read: int
) -> tuple[int, int]:
    """Forward operations of language layers: linears, attention. Behind the last one's attention, of ``read`` rows."""
    text = architecture.text
    query = text.num_attention_heads * text.head_dim
    key_value = text.num_key_value_heads * text.head_dim
    before = text.hidden_size * (query + 2 * key_value)
    after = text.hidden_size * (query + 3 * text.intermediate_size)
    linear = 2 * (number * tokens * before + ((number - 1) * tokens + read) * after)
    return linear, 4 * number * pairs * query
