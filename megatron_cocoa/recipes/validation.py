"""Retrieval on held-out pairs while a stage trains."""

from __future__ import annotations

from pathlib import Path

from megatron_cocoa.model.build import Model
from megatron_cocoa.recipes.context import RunContext
from megatron_cocoa.recipes.retrieval import POOLS, RetrievalProbe


class RetrievalValidation:
    """Recall on the held-out pool, both directions and their mean; see ``training.trainer.Validation``.

    Args:
        context: of the run; its ``validation.interval`` is set.
        image_size: of the stage that trains.

    Raises:
        ValueError: if the data folder has no held-out pool.
    """

    def __init__(self, context: RunContext, *, image_size: int | None) -> None:
        settings = context.settings
        self.interval, self.metric = settings.validation.interval, settings.validation.metric
        self._probe = RetrievalProbe(context, image_size=image_size)
        self._probe.pools = [pool for pool in self._probe.pools if pool.name == "heldout"]
        if not self._probe.pools:
            path = Path(settings.data.path) / POOLS["heldout"]
            raise ValueError(
                f"validation.interval is {self.interval}, but there is no {path} to validate on: write one (see "
                f"docs/data.md), or set validation.interval to null"
            )

    def measure(self, model: Model) -> dict[str, float]:
        """``recall@k`` averaged over both directions, and ``recall@k/<direction>``; every rank calls it."""
        metrics: dict[str, float] = {}
        rows = self._probe.recall(model, label="validation", kind="validation")
        for row in rows:
            for k, estimate in row.result.recall.items():
                metrics[f"recall@{k}/{row.direction}"] = estimate.value
                metrics[f"recall@{k}"] = metrics.get(f"recall@{k}", 0.0) + estimate.value / len(rows)
        return metrics
