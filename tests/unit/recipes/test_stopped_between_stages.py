"""A run that is asked to stop while it does not train begins nothing more that takes long."""

from types import SimpleNamespace

import pytest

from megatron_cocoa.config import TrainSettings
from megatron_cocoa.recipes import run
from megatron_cocoa.training.progress import Progress

STAGES = ("warmup", "bridge", "contrastive")


@pytest.mark.parametrize(
    ("after", "trained", "measured", "stopped"),
    [
        ("start", [], [], "before the first stage (signal SIGTERM)"),
        ("warmup", ["warmup"], ["untrained"], "after stage warmup, before measuring it (signal SIGTERM)"),
        ("measuring warmup", ["warmup"], ["untrained", "warmup"], "before stage bridge (signal SIGTERM)"),
        ("contrastive", [*STAGES], ["untrained", *STAGES[:2]], "after stage contrastive, before measuring it (signal"),
        ("never", [*STAGES], ["untrained", *STAGES], None),
    ],
)
def test_a_stop_begins_neither_a_stage_nor_a_measurement(monkeypatch, after, trained, measured, stopped):
    """Claim: the run ends where it was asked, and says so; it counts as complete only if it was measured to the end.

    No model is embedded twice: the examples of the last one are taken from what its recall was computed from.
    """
    done: list[str] = []
    events = ["start"]

    def run_stage(context, stage, *, name, checkpoint, after, **more):
        done.append(name)
        events.append(name)
        after(name, None)
        return SimpleNamespace(name=name, stage=stage, checkpoint=None, progress=Progress(), stopped=None)

    class Probe:
        def __init__(self, *args):
            self.seen, self.embedded = [], 0

        def in_form(self, form):
            return self

        def embed_pools(self, model):
            self.embedded += 1
            return []

        def recall(self, embeddings, *, label, kind):
            self.seen.append(label.removeprefix("after "))
            events.append(f"measuring {self.seen[-1]}")
            return []

        def examples(self, embeddings):
            return [], {}

    monkeypatch.setattr(run, "run_stage", run_stage)
    monkeypatch.setattr(run, "RetrievalProbe", Probe)
    monkeypatch.setattr(run, "describe", lambda summary: "")
    monkeypatch.setattr(run, "build_with_weights", lambda *args, **more: None)
    monkeypatch.setattr(run, "reconstructions", lambda *args: [])
    monkeypatch.setattr(run, "bridge_evidence", lambda *args, **more: None)
    stop = SimpleNamespace(reason=lambda: "signal SIGTERM" if after in events else None)
    stages = run._Stages(SimpleNamespace(settings=TrainSettings(evaluate=True)), {}, stop, {})
    stages.run()
    assert (done, stages.probe.seen) == (trained, measured)
    assert stages.probe.embedded == len(measured)
    assert stages.stopped is None if stopped is None else stages.stopped.startswith(stopped)
