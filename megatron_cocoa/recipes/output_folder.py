"""The output folder of a run: the names of what lies in it, and whether a run may write there.

    output_dir/
      settings.yaml  .job  .starts  results.json  report.html
      warmup/ bridge/ contrastive/ [baseline/]
        settings.yaml  summary.json  metrics.jsonl  validation.jsonl  tensorboard/  wandb.id
        checkpoints/step-00000200/    to resume the stage from, until it is complete
        checkpoint/                   the weights of the complete stage
        best/                         the weights of its best validation
        adapter/                      its adapters in peft's format
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_cocoa.atomic import unfinished
from megatron_cocoa.checkpoint.info import INFO_FILE
from megatron_cocoa.config import TrainSettings
from megatron_cocoa.settings.saved import SETTINGS_FILE
from megatron_cocoa.training.log import METRICS_FILE, VALIDATION_FILE, WANDB_FILE, import_wandb
from megatron_cocoa.training.output_owner import STARTS_FILE

JOB_FILE = ".job"
"""The job that a run belongs to, as ``LaunchInfo`` names it."""
RESULTS_FILE, REPORT_FILE = "results.json", "report.html"
RUN_FILES = (SETTINGS_FILE, JOB_FILE, RESULTS_FILE, REPORT_FILE)
"""Files of the whole run; everything else belongs to a stage and lies in its folder."""
PROBE = ".write-test"
UNFINISHED = (PROBE, unfinished(Path(SETTINGS_FILE)).name)
"""What a start leaves that a full disk or a signal ends while it writes."""

STAGE_CHECKPOINT, STEP_CHECKPOINTS = "checkpoint", "checkpoints"
ADAPTER_FOLDER = "adapter"
SUMMARY_FILE = "summary.json"


def holds_run(output: Path) -> bool:
    """Whether ``output`` belongs to a run that was started."""
    return (output / SETTINGS_FILE).is_file()


def check_output(settings: TrainSettings) -> bool:
    """Refuse an output folder that cannot be written, or that holds something which this run would destroy.

    That is an earlier run, unless it is resumed or ``overwrite`` gives it up, anything that no run wrote, and the
    model or checkpoint that this run starts from. What is left of a start that never took a step is no run. Weights &
    Biases without its package is refused here as well, since it would be missed only once the model is loaded.

    Nothing is removed yet: such a start may still live, and this one may still be refused. Call it on the first rank
    alone: it writes a file to see whether it can, which other ranks would find.

    Returns:
        Whether there is an earlier run.

    Raises:
        ValueError: naming the folder or the package, and what to change.
    """
    if settings.wandb_project is not None:
        import_wandb(settings.wandb_project)
    output = Path(settings.output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir {output} is a file: name a folder")
    was_trained = output.is_dir() and not all(_is_left_by_a_start(path, output) for path in output.rglob("*"))
    if was_trained:
        _check_earlier_run(output, settings)
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / PROBE
        try:
            probe.write_bytes(b"\0" * 65536)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {output} cannot be written: {error}; free space or name another one") from error
    return was_trained


def _check_earlier_run(output: Path, settings: TrainSettings) -> None:
    if not holds_run(output):
        raise ValueError(
            f"{output} is not empty and holds no {SETTINGS_FILE} of an earlier run: it is left as it is, name another "
            f"--output_dir"
        )
    if not (settings.overwrite or settings.resume):
        raise ValueError(
            f"{output} holds an earlier run: name another --output_dir, pass --resume true to go on with it, or "
            f"--overwrite true to remove it"
        )
    for name, source in (("model.load", settings.model.load), ("model.path", settings.model.path)):
        if settings.overwrite and source and Path(source).resolve().is_relative_to(output.resolve()):
            raise ValueError(f"{name} {source} lies in output_dir {output}, which would be overwritten")


def _is_left_by_a_start(path: Path, output: Path) -> bool:
    """Whether ``path`` below ``output`` is what a run writes before its first step, and nothing that cost a step."""
    if path.is_dir() and not path.is_symlink():
        return True
    parts = path.relative_to(output).parts
    if len(parts) == 1:
        return parts[0] in (SETTINGS_FILE, JOB_FILE, STARTS_FILE, *UNFINISHED)
    if len(parts) == 2 and parts[1] in (METRICS_FILE, VALIDATION_FILE):
        return path.stat().st_size == 0
    return parts[1:] == (WANDB_FILE,) or parts[1] in ("tensorboard", "wandb")


def clear_output(settings: TrainSettings) -> None:
    """Remove what an earlier run wrote to the output folder, and nothing else.

    ``STARTS_FILE`` stays: the earlier run may still live, and is to find there that it has lost the folder.
    """
    output = Path(settings.output_dir)
    for name in (*RUN_FILES, *UNFINISHED):
        (output / name).unlink(missing_ok=True)
    for folder in output.iterdir():
        if (folder / METRICS_FILE).is_file() or (folder / INFO_FILE).is_file():
            shutil.rmtree(folder)
