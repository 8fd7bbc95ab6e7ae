"""How texts and pictures are embedded, and a benchmark of them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Literal

from megatron_cocoa.config.checks import require

NATIVE = "native"
"""Asks for pictures that keep their shape. None asks for nothing: it leaves the size to the model."""

ImageSize = int | Literal["native"]
"""The side in pixels of a square that pictures are resized to, or ``native``."""


def parse_image_size(text: str) -> ImageSize:
    """An ``ImageSize`` from the command line."""
    if text == NATIVE:
        return NATIVE
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no picture size: needed {NATIVE}, or a side in pixels")
    return int(text)


@dataclass(frozen=True)
class EmbeddingSettings:
    """How a trained model embeds texts and pictures.

    Args:
        image_size: side in pixels of the square that every picture is resized to (CoCoA evaluates at 672; 336 and
            448 are its training sizes); ``native`` keeps their shape within the limits below; None for the model's
            own.
        min_image_tokens, max_image_tokens: merged units of a picture that keeps its shape; None for those that the
            model was trained with, else the processor's.
        max_length: tokens per item, longer texts are cut and counted, image tokens never are; None for the model's
            ``max_position_embeddings``.
        dtype: of parameters and activations.
        bridge_token: carries the embedding; None for the run's or the export's own.
    """

    image_size: ImageSize | None = None
    min_image_tokens: int | None = None
    max_image_tokens: int | None = None
    max_length: int | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    bridge_token: str | None = None

    def __post_init__(self) -> None:
        for name in ("image_size", "min_image_tokens", "max_image_tokens", "max_length"):
            value = getattr(self, name)
            require(not isinstance(value, int) or value >= 1, f"{name} is {value}, needs 1 or more")
        require(self.dtype in ("fp32", "bf16"), f"dtype is {self.dtype!r}, needs fp32 or bf16")


@dataclass(frozen=True)
class EvaluationSettings(EmbeddingSettings):
    """How a benchmark is embedded (``tools/evaluate_mmeb.py``); score files record all of it.

    Args:
        batch_size: items per pack. Scores do not depend on it beyond rounding.
        num_workers: threads that decode pictures while the model works.
        baselines: also embed each query without its picture, and without its text.
    """

    batch_size: int = 32
    num_workers: int = 2
    baselines: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}, needs 1 or more")
        require(self.num_workers >= 0, f"num_workers is {self.num_workers}, must not be negative")
