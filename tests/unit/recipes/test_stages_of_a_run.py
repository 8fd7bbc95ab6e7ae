"""Which weights each stage of a run starts from, and what a resumed run leaves out."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_cocoa.config import TrainSettings
from megatron_cocoa.recipes import run
from megatron_cocoa.recipes.resume import StagePlace
from megatron_cocoa.training.progress import Progress


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (
            {},
            [
                ("warmup", "warmup", None, None),
                ("bridge", "bridge", "out/warmup", None),
                ("contrastive", "contrastive", "out/bridge", None),
                ("baseline", "contrastive", None, None),
            ],
        ),
        (
            {"warmup": StagePlace(is_complete=True), "bridge": StagePlace(step=40)},
            [
                ("bridge", "bridge", "out/warmup", 40),
                ("contrastive", "contrastive", "out/bridge", None),
                ("baseline", "contrastive", None, None),
            ],
        ),
        (
            {name: StagePlace(is_complete=True) for name in ("warmup", "bridge", "contrastive")}
            | {"baseline": StagePlace(step=7)},
            [("baseline", "contrastive", None, 7)],
        ),
    ],
)
def test_each_stage_goes_on_from_the_one_before(monkeypatch, places, expected):
    """Claim: a stage starts from the weights of the stage before, the baseline from the run's own; a resumed run
    trains no complete stage again, and goes on from its own checkpoint within the one that was stopped."""
    begun = []

    def summary(name, stage):
        checkpoint = Path("out") / name
        return SimpleNamespace(name=name, stage=stage, checkpoint=checkpoint, progress=Progress(), stopped=None)

    def run_stage(context, stage, *, name, checkpoint, resume_step, **more):
        begun.append((name, stage, None if checkpoint is None else str(checkpoint), resume_step))
        return summary(name, stage)

    monkeypatch.setattr(run, "run_stage", run_stage)
    monkeypatch.setattr(run.StageSummary, "load", lambda folder, stage: summary(folder.name, stage))
    monkeypatch.setattr(run, "describe", lambda summary: "")
    stop = SimpleNamespace(reason=lambda: None)
    context = SimpleNamespace(settings=TrainSettings(evaluate=False, with_baseline=True), output=Path("out"))
    run._Stages(context, places, stop, {}).run()
    assert begun == expected
    assert run._stage_folders(context) == ["warmup", "bridge", "contrastive", "baseline"]
