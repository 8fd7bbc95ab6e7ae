"""What a run writes while it trains: a line per step for machines, TensorBoard events, a progress bar for people."""

from __future__ import annotations

import contextlib
import json
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megatron_cocoa.atomic import write_atomically
from megatron_cocoa.training.output_owner import TakenOver

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
        interval: steps between two updates of the progress bar's numbers. Where nobody watches, as in the log of a
            batch system, this is a line instead of a bar.
        done: steps that an earlier process has done; lines after them, of steps that were lost, are removed.
        wandb_project: also log to this Weights & Biases project.
        on_failure: told why the files cannot be written, after which nothing is written any more; None raises it.
        check_owner: ``OutputOwner.check``; called at the start, with each update of the progress bar's numbers, and
            before a line of a validation. Lines of steps in between do another run no harm: when it begins the stage it
            cuts their file back, by replacing it.

    Raises:
        ValueError: if ``wandb_project`` is given and the package is absent; without ``on_failure`` also from every
            method, if a file cannot or must not be written.
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
        on_failure: Callable[[str], None] | None = None,
        check_owner: Callable[[], None] = lambda: None,
    ):
        self.stage, self.interval, self.is_writer, self.done = stage, interval, is_writer, done
        self.folder, self.on_failure, self._check_owner = folder, on_failure, check_owner
        self._opened = contextlib.ExitStack()
        if is_writer:
            with self._failing_once():
                self._check_owner()
                self._open(folder, steps, wandb_project)

    def _open(self, folder: Path, steps: int, wandb_project: str | None) -> None:
        done = self.done
        folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, VALIDATION_FILE):
            _cut_after(folder / name, done)
        # By the line: a checkpoint counts on those of the steps before it.
        self.lines = self._opened.enter_context((folder / METRICS_FILE).open("a", encoding="utf-8", buffering=1))
        self.validations = folder / VALIDATION_FILE
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self._opened.callback(self.events.close)
        self.wandb = None
        if wandb_project is not None:
            self.wandb = _start_wandb(wandb_project, folder, self.stage, done=done)
            self._opened.callback(self.wandb.finish)
        # A bar is one line without an end, which tools that work by the line would hold back or keep whole.
        self.is_watched = sys.stderr.isatty()
        # The delay keeps tqdm from writing by itself, also at the end.
        how = dict(mininterval=1.0) if self.is_watched else dict(delay=sys.maxsize)
        self.bar = tqdm(total=steps, initial=done, desc=self.stage, unit="step", **how)
        self._opened.callback(self.bar.close)
        if not self.is_watched:
            self._say(str(self.bar))

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Record one step, counted from 1. ``metrics`` are floats by name."""
        if not self.is_writer:
            return
        is_shown = step % self.interval == 0
        with self._failing_once():
            if is_shown:
                self._check_owner()
            self.lines.write(json.dumps({"step": step, **metrics}) + "\n")
            self._record(step, metrics)
        self.bar.update()
        if is_shown or (step == self.bar.total and not self.is_watched):
            shown = {k: v for k, v in metrics.items() if k not in _NOT_IN_BAR and not (k == "skipped_steps" and not v)}
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)
            if not self.is_watched:
                self._say(str(self.bar))

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """Record what a validation after ``step`` found."""
        if not self.is_writer:
            return
        with self._failing_once():
            self._check_owner()
            if step == self.done:
                # A stop put it off, and an earlier process that went on from there may have made up for it.
                _cut_after(self.validations, step - 1)
            with self.validations.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._record(step, {f"validation/{name}": value for name, value in metrics.items()})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self._say(f"{self.stage}, step {step}: {shown}")

    def skipped(self, step: int, why: str) -> None:
        """Tell people why a step was not applied. Its metrics are recorded as those of any other."""
        if self.is_writer:
            self._say(f"{self.stage}, step {step} was skipped: {why}")

    def _record(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.events.add_scalar(f"{self.stage}/{name}", value, step)
        if self.wandb is not None:
            tagged = {f"{self.stage}/{name}": value for name, value in metrics.items()}
            self.wandb.log({f"{self.stage}/step": step, **tagged})

    def _say(self, text: str) -> None:
        # What the run needs are its files: where people read along may be a full disk or a pipe that is gone.
        with contextlib.suppress(OSError):
            if self.is_watched:
                self.bar.write(text)
            else:
                print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _failing_once(self) -> Iterator[None]:
        """Let the writing of files end at the first error, and tell it."""
        try:
            yield
        except (OSError, TakenOver) as error:
            if not self.is_writer:
                return
            self.is_writer = False
            message = self._why(error)
            if self.on_failure is None:
                raise ValueError(message) from error
            self.on_failure(message)

    def _why(self, error: OSError | TakenOver) -> str:
        try:
            # Also where a write has failed: NFS refuses one to a file that another run has replaced.
            self._check_owner()
        except TakenOver as taken:
            # To close them writes to files, and ends the run at Weights & Biases that the other run goes on with.
            self._opened.pop_all()
            return str(taken)
        except OSError:
            pass
        return (
            f"the log of stage {self.stage} cannot be written to {self.folder} ({error}): free space on its disk and "
            f"resume the run from its last checkpoint"
        )

    def close(self) -> None:
        with self._failing_once():
            self._opened.close()


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
