"""Which run a model's losses come from."""

import json

import pytest

from megatron_cocoa.recipes.curves import training_curves


@pytest.fixture
def run(tmp_path):
    output = tmp_path / "run"
    for stage, name in (("contrastive", "contrastive"), ("bridge", "mntp")):
        (output / stage / "checkpoint").mkdir(parents=True)
        lines = [{"step": step, name: 1.0 / step, "loss": 1.0 / step} for step in (1, 2)]
        (output / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (output / "settings.yaml").write_text("stages: [bridge, contrastive]\n")
    return output


def test_a_checkpoint_knows_its_run(run):
    """Claim: stages come in their order, with their losses and units."""
    found = training_curves(run / "contrastive" / "checkpoint")
    assert [curve.stage for curve in found] == ["bridge", "contrastive"]
    assert found[0].steps == (1, 2) and found[0].losses == {"mntp": (1.0, 0.5)}
    assert found[1].units == {"contrastive": "nats per pair"}


def test_an_export_is_told_its_run(run, tmp_path):
    """Claim: a model elsewhere has no losses until its run is named, and a folder without a run is refused."""
    assert training_curves(tmp_path / "export") == ()
    assert training_curves(tmp_path / "export", run) == training_curves(run / "bridge" / "checkpoint")
    with pytest.raises(ValueError, match="holds no run: none of warmup/metrics.jsonl"):
        training_curves(tmp_path / "export", tmp_path)


def test_a_line_that_was_cut_short_is_no_step(run):
    """Claim: a run whose process was killed in the middle of a line still has the losses of the steps before it."""
    with (run / "contrastive" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "contr')
    assert training_curves(run / "contrastive" / "checkpoint")[1].steps == (1, 2)
