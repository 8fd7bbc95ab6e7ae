"""How one stage of a run went, in memory and in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_cocoa.parallel import topology
from megatron_cocoa.recipes.output_folder import STAGE_CHECKPOINT, SUMMARY_FILE
from megatron_cocoa.training.progress import Progress


@dataclass(frozen=True)
class StageSummary:
    """How one stage of a run went.

    name:       of its folder in the run's output: the stage's, or ``baseline`` for contrastive learning alone.
    stage:      one of ``config.STAGES``.
    checkpoint: its weights, for the next stage.
    progress:   the trainer's counters.
    statistics: of the loaders of all replicas, since the last start of the process; see ``over_replicas``.
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


def over_replicas(own: dict[str, float]) -> dict[str, float]:
    """A loader's ``statistics`` for the whole run: what each replica counts is summed, the rest averaged.

    Every rank calls it, with its replica's. A picture that another replica could not use is told as well.
    """
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, (topology.data_parallel_rank(), own), group=topology.file_group())
    return merged(list(dict(found).values()))


def merged(replicas: Sequence[dict[str, float]]) -> dict[str, float]:
    """``over_replicas`` of the statistics of each replica. What all have alike, such as ``rows``, stays as it is."""
    whole = {}
    for name in dict.fromkeys(name for replica in replicas for name in replica):
        values = [replica[name] for replica in replicas if name in replica]
        if name in ("samples", "decoded", "cut_tokens") or name.startswith("skipped/"):
            whole[name] = sum(values)
        else:
            whole[name] = values[0] if len(set(values)) == 1 else sum(values) / len(values)
    return whole
