"""Which weights each stage of a run starts from, and what a resumed run leaves out."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_cocoa.config import ContrastiveSettings, TrainSettings
from megatron_cocoa.config.stages import EmbeddingForm
from megatron_cocoa.recipes import run, stages
from megatron_cocoa.recipes.resume import StagePlace
from megatron_cocoa.training.progress import Progress

DEFAULT, ASKED = EmbeddingForm(), EmbeddingForm("causal", "bare")


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


@pytest.mark.parametrize(
    ("names", "with_baseline", "expected"),
    [
        (
            ("warmup", "bridge", "contrastive"),
            True,
            {
                "untrained": DEFAULT,
                "after warmup": DEFAULT,
                "after bridge": DEFAULT,
                "after contrastive": ASKED,
                "contrastive alone": ASKED,
            },
        ),
        (("contrastive",), False, {"untrained": ASKED, "after contrastive": ASKED}),
    ],
)
def test_each_model_is_measured_in_the_form_that_it_was_trained_in(monkeypatch, names, with_baseline, expected):
    """Claim: embeddings mean nothing in another form than their stage's, and the untrained model's are in the first
    stage's. Examples are of the run's last stage, which is neither its first nor the baseline."""
    measured = {}

    class Probe:
        def __init__(self, context, stage):
            self.form = None

        def in_form(self, form):
            other = Probe(None, None)
            other.form = form
            return other

        def embed_pools(self, model):
            return f"vectors of {model} as {self.form}"

        def recall(self, found, *, label, kind):
            measured[label] = self.form
            return []

        def examples(self, found):
            return [f"examples of {found}"], {}

    def run_stage(context, stage, *, name, after, **more):
        after(name, name)
        return SimpleNamespace(name=name, stage=stage, checkpoint=None, progress=Progress(), stopped=None)

    monkeypatch.setattr(run, "run_stage", run_stage)
    monkeypatch.setattr(run, "RetrievalProbe", Probe)
    monkeypatch.setattr(run, "describe", lambda summary: "")
    monkeypatch.setattr(run, "build_with_weights", lambda *args, **more: "untrained")
    monkeypatch.setattr(run, "reconstructions", lambda *args: [])
    monkeypatch.setattr(run, "bridge_evidence", lambda *args, **more: None)
    contrastive = ContrastiveSettings(attention=ASKED.attention, image_placeholder=ASKED.image_placeholder)
    settings = TrainSettings(stages=names, evaluate=True, with_baseline=with_baseline, contrastive=contrastive)
    context = SimpleNamespace(settings=settings, output=Path("out"))
    found = run._Stages(context, {}, SimpleNamespace(reason=lambda: None), {}).run()
    assert measured == expected
    assert found.strips == [f"examples of vectors of contrastive as {ASKED}"]


def test_a_checkpoint_says_how_its_stage_sized_pictures_and_embedded():
    """Claim: whoever loads it embeds in the form, and with pictures of the size, that it was trained with."""
    form = dict(attention="causal", image_placeholder="bare")
    sizes = dict(image_size=None, min_image_tokens=4, max_image_tokens=64)
    context = SimpleNamespace(
        settings=TrainSettings(contrastive=ContrastiveSettings(**form, **sizes)),
        bundle=SimpleNamespace(mask_token_id=3, bridge_token_id=5),
        hf_config={"model_type": "qwen2_5_vl"},
    )
    info = stages._describe_checkpoint(context, "contrastive")
    assert info.pictures == sizes and info.embedding_form == EmbeddingForm(**form)
    assert (info.stage, info.mask_token_id, info.bridge_token_id) == ("contrastive", 3, 5)
    # Reconstruction trains in the form that is the default, whatever stage contrastive embeds in.
    assert stages._describe_checkpoint(context, "warmup").embedding_form == EmbeddingForm()
