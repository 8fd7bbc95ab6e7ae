"""How a benchmark is embedded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_cocoa.config.checks import require


@dataclass(frozen=True)
class EvaluationSettings:
    """How a benchmark's texts and pictures are embedded (``tools/evaluate_mmeb.py``); score files record all of it.

    Args:
        image_size: side in pixels of the square that every picture is resized to (CoCoA evaluates at 672; 336 and
            448 are its training sizes); None keeps their shape within the processor's limits (``native``).
        max_length: tokens per item, longer texts are cut and counted, image tokens never are; None for the model's
            ``max_position_embeddings``.
        dtype: of parameters and activations.
        bridge_token: carries the embedding; None for the run's or the export's own.
        batch_size: items per pack. Scores do not depend on it beyond rounding.
        num_workers: threads that decode pictures while the model works.
        baselines: also embed each query without its picture, and without its text.
    """

    image_size: int | None = None
    max_length: int | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    bridge_token: str | None = None
    batch_size: int = 32
    num_workers: int = 2
    baselines: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "max_length", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is {value}, needs 1 or more")
        require(self.num_workers >= 0, f"num_workers is {self.num_workers}, must not be negative")
