"""Settings of the optimizer, of checkpoints and of validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_cocoa.config.checks import require


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW as Megatron-Core runs it.

    Args:
        weight_decay: decoupled; biases and norms are exempt.
        clip_grad: global gradient norm above which gradients are scaled down; 0 never clips.
        adam_beta1, adam_beta2, adam_eps: decay of Adam's moments, in [0, 1), and its epsilon, above 0.
        max_norm_ratio: skip a step whose gradient norm exceeds this many times the median of the last 100 applied steps
            (20 at least); None applies all that are finite. May be set when a run is resumed.
        max_skipped_steps: a run stops after this many steps in a row whose loss or gradient was not finite, or whose
            gradient norm exceeded ``max_norm_ratio``.
    """

    weight_decay: float = 0.0
    clip_grad: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    max_norm_ratio: float | None = None
    max_skipped_steps: int = 10

    def __post_init__(self) -> None:
        for name in ("weight_decay", "clip_grad"):
            require(getattr(self, name) >= 0, f"optimizer.{name} is {getattr(self, name)}, must not be negative")
        for name in ("adam_beta1", "adam_beta2"):
            require(0.0 <= getattr(self, name) < 1.0, f"optimizer.{name} is {getattr(self, name)}, must lie in [0, 1)")
        # Rows of the embedding that no sample holds have moments of zero: 0 / 0.
        require(self.adam_eps > 0, f"optimizer.adam_eps is {self.adam_eps}, must be positive")
        require(
            self.max_norm_ratio is None or self.max_norm_ratio > 1,
            f"optimizer.max_norm_ratio is {self.max_norm_ratio}, needs more than 1 (half of all norms lie above their "
            f"median), or null",
        )
        require(
            self.max_skipped_steps >= 1,
            f"optimizer.max_skipped_steps is {self.max_skipped_steps}, needs 1 or more",
        )


@dataclass(frozen=True)
class CheckpointSettings:
    """Checkpoints from which a stage can be resumed, beside the weights that each stage leaves at its end.

    Args:
        save_interval: steps between two of them; None writes one only if a run is stopped before its end.
        keep: how many of the newest are kept.
        asynchronous: write them in a background process while training goes on; costs a copy of the state in
            host memory.
        time_budget_minutes: write a checkpoint and stop after this time, counted from the start of the process, so
            that a batch system's time limit costs no steps.
    """

    save_interval: int | None = None
    keep: int = 2
    asynchronous: bool = False
    time_budget_minutes: float | None = None

    def __post_init__(self) -> None:
        require(
            self.save_interval is None or self.save_interval >= 1,
            f"checkpoint.save_interval is {self.save_interval}, needs 1 or more, or null",
        )
        require(self.keep >= 1, f"checkpoint.keep is {self.keep}, needs 1 or more")
        require(
            self.time_budget_minutes is None or self.time_budget_minutes > 0,
            f"checkpoint.time_budget_minutes is {self.time_budget_minutes}, must be positive, or null",
        )


@dataclass(frozen=True)
class ValidationSettings:
    """Retrieval on held-out pairs (``eval_heldout.jsonl`` of the data folder) while a stage trains.

    Args:
        interval: steps between two validations, no more than a stage of the run has; None never validates.
        metric: what decides which weights are kept as ``<stage>/best``, averaged over both directions.
    """

    interval: int | None = None
    metric: Literal["recall@1", "recall@5", "recall@10"] = "recall@1"

    def __post_init__(self) -> None:
        require(
            self.interval is None or self.interval >= 1,
            f"validation.interval is {self.interval}, needs 1 or more, or null",
        )
        require(
            self.interval is not None or self.metric == type(self).metric,
            f"validation.metric {self.metric} would have no effect: validation.interval is null, set it to a number of "
            f"steps",
        )
