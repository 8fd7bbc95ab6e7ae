"""How good the model is on held-out pairs while a stage trains: retrieval, and in stage ``bridge`` block B's loss."""

from __future__ import annotations

from megatron_cocoa.model.build import Model
from megatron_cocoa.recipes.context import RunContext
from megatron_cocoa.recipes.evidence import bridge_evidence
from megatron_cocoa.recipes.retrieval import RetrievalProbe


class HeldOutValidation:
    """Recall on the held-out pool, both directions and their mean; see ``training.trainer.Validation``.

    Args:
        context: of the run; its ``validation.interval`` is set, for which ``prepare_context`` has seen the pool.
        stage: the one that trains; it gives the size of pictures, and in ``bridge`` block B's loss is measured as well.
    """

    def __init__(self, context: RunContext, *, stage: str) -> None:
        settings = context.settings
        self._context, self._stage = context, stage
        self.interval, self.metric = settings.validation.interval, settings.validation.metric
        self._probe = RetrievalProbe(context, settings.stage(stage))
        self._probe.pools = [pool for pool in self._probe.pools if pool.name == "heldout"]

    def measure(self, model: Model) -> dict[str, float]:
        """``recall@k`` averaged over both directions, and ``recall@k/<direction>``; every rank calls it.

        In stage ``bridge`` also ``nats_per_token``, ``nats_per_token/another_A``, and ``nats_per_token/visible_<n>``
        for samples with so many unmasked tokens in block B.
        """
        metrics: dict[str, float] = {}
        rows = self._probe.recall(self._probe.embed_pools(model), label="validation", kind="validation")
        for row in rows:
            for k, estimate in row.result.recall.items():
                metrics[f"recall@{k}/{row.direction}"] = estimate.value
                metrics[f"recall@{k}"] = metrics.get(f"recall@{k}", 0.0) + estimate.value / len(rows)
        return metrics | (self._bridge_losses(model) if self._stage == "bridge" else {})

    def _bridge_losses(self, model: Model) -> dict[str, float]:
        evidence = bridge_evidence(self._context, model, pool="heldout", label="validation")
        if evidence is None:
            return {}
        losses = {"nats_per_token": evidence.own, "nats_per_token/another_A": evidence.other}
        return losses | {f"nats_per_token/visible_{b.label.replace(' ', '_')}": b.own for b in evidence.by_visible}
