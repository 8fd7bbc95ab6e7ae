"""What a later stage would refuse at its first step is refused before the first stage trains."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_cocoa.config import ContrastiveSettings, FreezeSettings, TrainSettings
from megatron_cocoa.recipes import run
from megatron_cocoa.recipes.resume import StagePlace
from megatron_cocoa.recipes.stage_checks import check_contrastive


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(matryoshka_dims=(64, 512)), r"matryoshka_dims are \[64, 512\], the model's embeddings have 256"),
        (dict(global_batch_size=1, micro_batch_size=1), "global_batch_size is 1, needs 2 or more"),
    ],
)
def test_contrastive_learning_is_checked_with_the_model(changes, message):
    """Claim: dimensions that the model does not have, and steps without a negative, cost no training."""
    architecture = SimpleNamespace(text=SimpleNamespace(hidden_size=256))
    settings = replace(TrainSettings(), contrastive=ContrastiveSettings(**changes))
    with pytest.raises(ValueError, match=message):
        check_contrastive(SimpleNamespace(settings=settings, architecture=architecture))
    check_contrastive(SimpleNamespace(settings=TrainSettings(), architecture=architecture))


def test_stages_that_are_complete_are_not_read_again(monkeypatch):
    """Claim: a run that resumes in its last stage does not read the rows of the others, which may take minutes."""
    built = []
    monkeypatch.setattr(run, "build_loader", lambda context, stage: built.append(stage) or stage)
    monkeypatch.setattr(run, "check_microbatches", lambda context, stage: None)
    monkeypatch.setattr(run, "check_contrastive", lambda context: None)
    monkeypatch.setattr(run, "check_model", lambda architecture, settings: None)
    source = SimpleNamespace(check=lambda: None)
    context = SimpleNamespace(architecture=None, settings=TrainSettings(), weight_source=lambda _: source)
    places = {"warmup": StagePlace(True, None), "bridge": StagePlace(True, None), "contrastive": StagePlace(False, 40)}
    assert run._checked_loaders(context, places) == {"contrastive": "contrastive"}
    assert built == ["contrastive"]
    assert list(run._checked_loaders(context, {})) == ["warmup", "bridge", "contrastive"]


def test_a_stage_in_which_nothing_trains_is_refused():
    """Claim: stage 3 has no image decoder and no mask token, so freezing all of the model costs no steps."""
    architecture = SimpleNamespace(text=SimpleNamespace(hidden_size=256))
    frozen = TrainSettings(freeze=FreezeSettings(vision=True, merger=True, language=True))
    with pytest.raises(ValueError, match="leave nothing to train in stage contrastive"):
        check_contrastive(SimpleNamespace(settings=frozen, architecture=architecture))
    learned = replace(frozen, contrastive=ContrastiveSettings(learnable_temperature=True))
    check_contrastive(SimpleNamespace(settings=learned, architecture=architecture))
