"""How one stage of a run went, in memory and in its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_cocoa.recipes.output_folder import STAGE_CHECKPOINT, SUMMARY_FILE
from megatron_cocoa.training.progress import Progress


@dataclass(frozen=True)
class StageSummary:
    """How one stage of a run went.

    name:       of its folder in the run's output: the stage's, or ``baseline`` for contrastive learning alone.
    stage:      one of ``config.STAGES``.
    checkpoint: its weights, for the next stage.
    progress:   the trainer's counters.
    statistics: of the loader on the first data-parallel rank, since the last start of the process.
    stopped:    why the stage ended before its last step; None where it is complete.
    """

    name: str
    stage: str
    checkpoint: Path
    progress: Progress
    statistics: dict[str, float]
    stopped: str | None = None

    def save(self, folder: Path) -> None:
        """Write what ``load`` needs. Call it before the weights are saved, so that a complete stage always has it."""
        text = json.dumps({"progress": self.progress.as_dict(), "statistics": self.statistics}, indent=1)
        (folder / SUMMARY_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, stage: str) -> StageSummary:
        """The summary of a stage that an earlier process has completed."""
        values = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        progress = Progress.from_dict(values["progress"])
        return cls(folder.name, stage, folder / STAGE_CHECKPOINT, progress, values["statistics"])
