"""From a stage's name to its objective, with the settings that belong to it."""

from __future__ import annotations

from megatron_cocoa.batch import MaskKind
from megatron_cocoa.config import STAGES, TrainSettings
from megatron_cocoa.objectives.base import GlobalObjective, LocalObjective
from megatron_cocoa.objectives.contrastive import ContrastiveObjective
from megatron_cocoa.objectives.eos_bridged import EosBridgedObjective
from megatron_cocoa.objectives.warmup import WarmupObjective


def build_objective(stage: str, settings: TrainSettings) -> LocalObjective | GlobalObjective:
    """The objective of ``stage``; ask ``isinstance(..., GlobalObjective)`` which of the two kinds it is.

    Args:
        stage: one of ``config.STAGES``.
        settings: the whole run's; only the stage's own part is read.

    Raises:
        ValueError: if there is no such stage.
    """
    if stage == "warmup":
        return WarmupObjective(mae_weight=settings.warmup.mae_weight)
    if stage == "bridge":
        return EosBridgedObjective(MaskKind.of_bridge_stage(bridge_sees_target=settings.bridge.bridge_sees_target))
    if stage == "contrastive":
        own = settings.contrastive
        return ContrastiveObjective(
            temperature=own.temperature,
            symmetric=own.symmetric,
            mask_equal_targets=own.mask_equal_targets,
            hard_negatives_shared=own.hard_negatives_shared,
            matryoshka_dims=own.matryoshka_dims,
            matryoshka_weights=own.matryoshka_weights,
            mask_kind=MaskKind(own.attention),
        )
    raise ValueError(f"unknown stage {stage!r}: choose from {', '.join(STAGES)}")
