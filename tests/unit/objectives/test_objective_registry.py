"""Each stage gets the objective and the settings that its configuration names."""

from __future__ import annotations

import pytest

from megatron_cocoa.batch import MaskKind
from megatron_cocoa.config import STAGES, BridgeSettings, ContrastiveSettings, TrainSettings, WarmupSettings
from megatron_cocoa.objectives import GlobalObjective, LocalObjective, build_objective

CONTRASTIVE = dict(
    temperature=0.07,
    symmetric=True,
    mask_equal_targets=True,
    hard_negatives_shared=False,
    matryoshka_dims=(64, 16),
    matryoshka_weights=(1.0, 0.5),
)


def test_every_stage_has_an_objective_of_one_kind():
    """Claim: the trainer can tell local from global objectives by their interface alone."""
    kinds = {}
    for stage in STAGES:
        objective = build_objective(stage, TrainSettings())
        kinds[stage] = isinstance(objective, LocalObjective), isinstance(objective, GlobalObjective)
    assert kinds == {"warmup": (True, False), "bridge": (True, False), "contrastive": (False, True)}


def test_settings_reach_the_objective():
    """Claim: no field of the decision table is lost on the way."""
    settings = TrainSettings(
        warmup=WarmupSettings(mae_weight=0.1),
        bridge=BridgeSettings(bridge_sees_target=False),
        contrastive=ContrastiveSettings(**CONTRASTIVE, num_hard_negatives=1),
    )
    assert build_objective("warmup", settings).weights == {"mntp": 1.0, "mae": 0.1}
    assert build_objective("bridge", settings).mask_kind is MaskKind.EOS_BRIDGED_STRICT
    assert build_objective("bridge", TrainSettings()).mask_kind is MaskKind.EOS_BRIDGED
    contrastive = build_objective("contrastive", settings)
    assert {name: getattr(contrastive, name) for name in CONTRASTIVE} == CONTRASTIVE


def test_unknown_stage_is_refused():
    """Claim: a typo names the stages there are."""
    with pytest.raises(ValueError, match="unknown stage 'brigde': choose from warmup, bridge, contrastive"):
        build_objective("brigde", TrainSettings())


def test_the_attention_of_stage_contrastive_is_its_settings():
    settings = TrainSettings(contrastive=ContrastiveSettings(attention="causal"))
    assert build_objective("contrastive", settings).mask_kind is MaskKind.CAUSAL
    assert build_objective("contrastive", TrainSettings()).mask_kind is MaskKind.BIDIRECTIONAL
