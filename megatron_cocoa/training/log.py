"""What a run writes while it trains: a line per step for machines, TensorBoard events, a progress bar for people."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megatron_cocoa.atomic import write_atomically

METRICS_FILE, VALIDATION_FILE, WANDB_FILE = "metrics.jsonl", "validation.jsonl", "wandb.id"
_NOT_IN_BAR = frozenset(
    "seconds lr tokens tokens_per_second_per_gpu samples_per_second_per_gpu tflops_per_second_per_gpu hfu "
    "skipped_samples data_wait memory_gib".split()
)


class StageLog:
    """Writes one stage's steps. Only the first rank writes; elsewhere every call does nothing.

    Args:
        folder: of the stage; gets ``metrics.jsonl``, ``validation.jsonl`` and TensorBoard events.
        stage: its name, which prefixes every TensorBoard tag.
        steps: how many are expected.
        is_writer: whether this rank writes.
        interval: steps between two updates of the progress bar's numbers.
        done: steps that an earlier process has done; lines after them, of steps that were lost, are removed.
        wandb_project: also log to this Weights & Biases project.

    Raises:
        ValueError: if ``wandb_project`` is given and the package is absent.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stage: str,
        steps: int,
        is_writer: bool,
        interval: int,
        done: int = 0,
        wandb_project: str | None = None,
    ):
        self.stage, self.interval, self.is_writer, self.done = stage, interval, is_writer, done
        if not is_writer:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, VALIDATION_FILE):
            _cut_after(folder / name, done)
        # By the line: a checkpoint counts on those of the steps before it.
        self.lines = (folder / METRICS_FILE).open("a", encoding="utf-8", buffering=1)
        self.validations = folder / VALIDATION_FILE
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self.bar = tqdm(total=steps, initial=done, desc=stage, unit="step", mininterval=1.0)
        self.wandb = None if wandb_project is None else _start_wandb(wandb_project, folder, stage, done=done)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Record one step, counted from 1. ``metrics`` are floats by name."""
        if not self.is_writer:
            return
        self.lines.write(json.dumps({"step": step, **metrics}) + "\n")
        self._record(step, metrics)
        self.bar.update()
        if step % self.interval == 0:
            shown = {k: v for k, v in metrics.items() if k not in _NOT_IN_BAR and not (k == "skipped_steps" and not v)}
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """Record what a validation after ``step`` found."""
        if not self.is_writer:
            return
        if step == self.done:
            # A stop put it off, and an earlier process that went on from there may have made up for it.
            _cut_after(self.validations, step - 1)
        with self.validations.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._record(step, {f"validation/{name}": value for name, value in metrics.items()})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.bar.write(f"{self.stage}, step {step}: {shown}")

    def _record(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.events.add_scalar(f"{self.stage}/{name}", value, step)
        if self.wandb is not None:
            tagged = {f"{self.stage}/{name}": value for name, value in metrics.items()}
            self.wandb.log({f"{self.stage}/step": step, **tagged})

    def close(self) -> None:
        if self.is_writer:
            self.bar.close()
            self.lines.close()
            self.events.close()
            if self.wandb is not None:
                self.wandb.finish()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The steps that ``StageLog`` wrote to ``folder``, in order."""
    return _read_lines(folder / METRICS_FILE)


def _read_lines(path: Path) -> list[dict[str, float]]:
    """Lines of a file that a writer may have been killed in: a last one that was cut short is none."""
    if not path.is_file():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole]


def _cut_after(path: Path, done: int) -> None:
    """Keep the lines of the first ``done`` steps; a last line that was cut short goes as well."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= done:
                kept.append(line)
        except json.JSONDecodeError:
            break
    write_atomically(path, "".join(kept))


def import_wandb(project: str):
    """The package that ``wandb_project`` needs.

    Raises:
        ValueError: if it is absent.
    """
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"wandb_project is {project!r}, but the wandb package is not installed: pip install wandb, or set "
            f"wandb_project to null"
        ) from error
    return wandb


def _start_wandb(project: str, folder: Path, stage: str, *, done: int):
    """The stage's run there, the same one again where the stage goes on."""
    wandb = import_wandb(project)
    known = folder / WANDB_FILE
    identity = known.read_text(encoding="utf-8") if done and known.is_file() else uuid.uuid4().hex
    known.write_text(identity, encoding="utf-8")
    name = f"{folder.parent.name}/{stage}"
    run = wandb.init(project=project, dir=str(folder), name=name, id=identity, resume="allow")
    run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    return run
