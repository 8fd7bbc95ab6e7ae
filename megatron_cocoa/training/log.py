"""What a run writes while it trains: a line per step for machines, TensorBoard events, a progress bar for people."""

from __future__ import annotations

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class StageLog:
    """Writes one stage's steps. Only the first rank writes; elsewhere every call does nothing.

    Args:
        folder: of the stage; gets ``metrics.jsonl`` and TensorBoard events.
        stage: its name, which prefixes every TensorBoard tag.
        steps: how many are expected.
        is_writer: whether this rank writes.
        interval: steps between two updates of the progress bar's numbers.
    """

    def __init__(self, folder: Path, *, stage: str, steps: int, is_writer: bool, interval: int):
        self.stage, self.interval, self.is_writer = stage, interval, is_writer
        if not is_writer:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.lines = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self.events = SummaryWriter(str(folder / "tensorboard"))
        self.bar = tqdm(total=steps, desc=stage, unit="step", mininterval=1.0)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Record one step, counted from 1. ``metrics`` are floats by name."""
        if not self.is_writer:
            return
        self.lines.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self.events.add_scalar(f"{self.stage}/{name}", value, step)
        self.bar.update()
        if step % self.interval == 0:
            self.lines.flush()
            shown = {k: v for k, v in metrics.items() if k not in ("seconds", "lr", "tokens")}
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)

    def close(self) -> None:
        if self.is_writer:
            self.bar.close()
            self.lines.close()
            self.events.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The steps that ``StageLog`` wrote to ``folder``, in order."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
