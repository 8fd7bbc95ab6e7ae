"""A run's losses over its steps, read from the metrics that it wrote."""

from __future__ import annotations

from pathlib import Path

from megatron_cocoa.config import STAGES
from megatron_cocoa.conversion.companions import run_folder
from megatron_cocoa.evaluation.report_data import StageCurve
from megatron_cocoa.training.log import METRICS_FILE, read_metrics

LOSS_UNITS = {"mntp": "nats per token", "mae": "mean squared error", "contrastive": "nats per pair"}


def stage_curve(folder: Path, *, seconds: float | None = None) -> StageCurve:
    """Losses of the stage whose folder is ``folder``, named after it; ``seconds``: how long the stage took."""
    lines = read_metrics(folder)
    names = [name for name in LOSS_UNITS if lines and name in lines[0]]
    return StageCurve(
        stage=folder.name,
        steps=tuple(int(line["step"]) for line in lines),
        losses={name: tuple(line[name] for line in lines) for name in names},
        units={name: LOSS_UNITS[name] for name in names},
        seconds=seconds,
    )


def training_curves(model: str | Path, run: str | Path | None = None) -> tuple[StageCurve, ...]:
    """Losses of the run that trained a model, by stage in CoCoA's order.

    Args:
        model: checkpoint or export.
        run: the run's output folder; without, the one that ``model`` lies in, if any.

    Raises:
        ValueError: if ``run`` is given and holds no losses.
    """
    folder = Path(run) if run is not None else run_folder(Path(model))
    stages = [] if folder is None else [folder / name for name in STAGES if (folder / name / METRICS_FILE).is_file()]
    if run is not None and not stages:
        looked_for = ", ".join(f"{name}/{METRICS_FILE}" for name in STAGES)
        raise ValueError(f"{run} holds no run: none of {looked_for} is there")
    return tuple(stage_curve(stage) for stage in stages)
