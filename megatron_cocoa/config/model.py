"""Which model runs, which of its parts train, and what is recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_cocoa.config.checks import require

Recompute = Literal["none", "mlp", "selective", "full"]


@dataclass(frozen=True)
class ModelSettings:
    """Which model, in which precision, on which kernels.

    Args:
        path: folder with a Hugging Face ``config.json``, tokenizer and ``preprocessor_config.json``. Its
            safetensors are loaded.
        random_weights: draw the weights from ``seed`` if ``path`` has no safetensors, as the toy preset does; false
            refuses such a folder.
        load: Megatron checkpoint to start from instead of the weights in ``path``.
        dtype: parameters and activations; gradients and master weights stay FP32 under ``bf16``.
        transformer_impl: ``local`` is torch and Megatron-Core alone, ``transformer_engine`` needs the package
            and a GPU, ``auto`` takes Transformer Engine where both are present.
        attention_backend: ``auto`` takes a flash kernel on a GPU that has one, else torch's SDPA.
        vision_attention_backend: the tower's; None is the same as ``attention_backend``.
        fp8: recipe for the language model's linear layers under Transformer Engine. ``delayed`` and ``tensorwise``
            (current scaling) need Ada, Hopper or newer, ``blockwise`` Hopper or newer, ``mxfp8`` Blackwell.
        fp8_vision: use FP8 in the tower's linear layers as well; the number of patches is padded inside the tower, its
            ffn width by ``vision_ffn_multiple``. False leaves the tower in ``dtype``.
        fp8_param: keep the weights of those layers in FP8 and gather them in FP8; the master weights stay FP32 in the
            distributed optimizer. Not with ``mxfp8``.
        vision_ffn_multiple: zero-pad the tower's ffn width to a multiple of this (exact; the published 3420
            needs 128 for FP8 or for tensor parallel degrees that do not divide it). 1 pads nothing.
        make_vocab_size_divisible_by: vocabulary rows are padded to a multiple of this times the tensor
            parallel degree, as in Megatron-LM.
        mask_token: token that replaces masked text; its id is the tokenizer's, or where it has no such token, the first
            row after its last.
        bridge_token: token that carries the embedding.
    """

    path: str | None = None
    random_weights: bool = False
    load: str | None = None
    dtype: Literal["fp32", "bf16"] = "bf16"
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    attention_backend: Literal["auto", "sdpa", "flash", "transformer_engine", "flex"] = "auto"
    vision_attention_backend: Literal["auto", "sdpa", "flash", "transformer_engine", "flex"] | None = None
    fp8: Literal["delayed", "tensorwise", "mxfp8", "blockwise"] | None = None
    fp8_vision: bool = False
    fp8_param: bool = False
    vision_ffn_multiple: int = 1
    make_vocab_size_divisible_by: int = 128
    mask_token: str = "<|mask|>"
    bridge_token: str = "<|im_end|>"

    def __post_init__(self) -> None:
        require(self.vision_ffn_multiple >= 1, f"vision_ffn_multiple is {self.vision_ffn_multiple}, needs 1 or more")
        require(
            self.make_vocab_size_divisible_by >= 1,
            f"make_vocab_size_divisible_by is {self.make_vocab_size_divisible_by}, needs 1 or more",
        )
        require(
            self.fp8 is None or self.transformer_impl != "local",
            "fp8 needs Transformer Engine: set model.transformer_impl to transformer_engine, or model.fp8 to null",
        )
        for name in ("fp8_vision", "fp8_param"):
            require(
                self.fp8 is not None or not getattr(self, name),
                f"model.{name} needs a recipe: set model.fp8 (delayed or tensorwise on Hopper), or {name} to false",
            )
        require(
            not self.fp8_param or self.dtype == "bf16",
            f"model.fp8_param needs model.dtype bf16, found {self.dtype}",
        )
        # Megatron would move such weights into a buffer of its own, and Transformer Engine cannot (replace_raw_data).
        require(
            not (self.fp8_param and self.fp8 == "mxfp8"),
            "model.fp8_param has no form for model.fp8 mxfp8: set it to false, or model.fp8 to delayed, tensorwise or "
            "blockwise",
        )


@dataclass(frozen=True)
class FreezeSettings:
    """Parts that do not train. The image decoder and the mask token's row always do.

    Args:
        vision: the tower without its merger.
        merger: the tower's patch merger.
        language: decoder, embeddings and output layer.
    """

    vision: bool = False
    merger: bool = False
    language: bool = False


@dataclass(frozen=True)
class RecomputeSettings:
    """Activation recompute, separately for tower and language model.

    Args:
        vision, language: ``full`` recomputes whole layers. ``mlp`` recomputes MLPs only, which hold about half of what
            a layer of the tower keeps and 70% of what one of the language model keeps; local layers without adapters
            repeat only the MLP's first projection. ``selective`` recomputes core attention only, which saves nothing
            here, because no attention kernel of this project keeps its scores.
        vision_num_layers, language_num_layers: under ``full`` the number of layers per recomputed block, 1 by default;
            it must divide the layers of each pipeline stage (and virtual chunk). Under ``mlp`` only the first so many
            layers of each are recomputed, by default all.
    """

    vision: Recompute = "none"
    language: Recompute = "none"
    vision_num_layers: int | None = None
    language_num_layers: int | None = None

    def __post_init__(self) -> None:
        for name in ("vision", "language"):
            number, mode = getattr(self, f"{name}_num_layers"), getattr(self, name)
            require(number is None or number >= 1, f"recompute.{name}_num_layers is {number}, needs 1 or more")
            require(
                number in (None, 1) or mode in ("mlp", "full"),
                f"recompute.{name}_num_layers is {number} and recompute.{name} {mode}: it counts layers under mlp and "
                f"full alone",
            )

    def mlp_layers(self, name: Literal["vision", "language"], layers: int, *, stages: int = 1) -> int:
        """How many of ``layers`` layers over ``stages`` pipeline stages recompute their MLP."""
        if getattr(self, name) != "mlp":
            return 0
        number = getattr(self, f"{name}_num_layers")
        return layers if number is None else min(stages * number, layers)
