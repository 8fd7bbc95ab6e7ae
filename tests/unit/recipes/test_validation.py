"""What is measured while a stage trains."""

from types import SimpleNamespace

import pytest

from megatron_cocoa.config import TrainSettings, ValidationSettings
from megatron_cocoa.recipes import validation


class Probe:
    """Finds fixed recalls, in the pools that it is left with."""

    def __init__(self, context, stage) -> None:
        self.pools = [SimpleNamespace(name=name) for name in ("train", "heldout")]
        self.stage = stage

    def embed_pools(self, model):
        return [(model, pool.name) for pool in self.pools]

    def recall(self, embeddings, *, label, kind):
        assert embeddings == [("the model", "heldout")]
        found = {"text_to_image": {1: 0.2, 10: 0.6}, "image_to_text": {1: 0.4, 10: 1.0}}
        return [
            SimpleNamespace(
                direction=direction,
                result=SimpleNamespace(recall={k: SimpleNamespace(value=value) for k, value in recall.items()}),
            )
            for direction, recall in found.items()
        ]


def evidence(context, model, *, pool, label):
    assert (model, pool) == ("the model", "heldout")
    return SimpleNamespace(own=2.0, other=2.5, by_visible=[SimpleNamespace(label="3 or more", own=1.5)])


@pytest.mark.parametrize("stage", ["bridge", "contrastive"])
def test_validation_measures_the_held_out_pool_in_both_directions(monkeypatch, stage):
    """Claim: no training pair is validated on, recall is the mean of both directions, and block B's losses belong to
    stage bridge."""
    monkeypatch.setattr(validation, "RetrievalProbe", Probe)
    monkeypatch.setattr(validation, "bridge_evidence", evidence)
    settings = TrainSettings(validation=ValidationSettings(interval=10))
    found = validation.HeldOutValidation(SimpleNamespace(settings=settings), stage=stage)
    assert found.interval == 10 and found._probe.stage is settings.stage(stage)
    recall = {
        "recall@1": 0.3,
        "recall@1/text_to_image": 0.2,
        "recall@1/image_to_text": 0.4,
        "recall@10": 0.8,
        "recall@10/text_to_image": 0.6,
        "recall@10/image_to_text": 1.0,
    }
    losses = {"nats_per_token": 2.0, "nats_per_token/another_A": 2.5, "nats_per_token/visible_3_or_more": 1.5}
    assert found.measure("the model") == pytest.approx(recall | (losses if stage == "bridge" else {}))
