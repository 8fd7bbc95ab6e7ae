"""Runs of the launch script that tests of this folder look at; ``conftest.py`` starts them beside the other tests.

Most of a run's time goes into the start of its process, which a GPU need not wait for: so several start at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from megatron_cocoa.config import ModelSettings
from megatron_cocoa.model.specs import resolve_implementation
from tests.e2e.test_run import train
from tests.e2e.test_survival import finish, losses, ranks_of, start, wait_for_step

AT_ONCE = max(1, min(6, (os.cpu_count() or 1) // 2))
"""Runs: a run on a GPU keeps one core busy, and compiles its kernels on more at its start."""

# The toy preset asks for local layers everywhere.
BEST = ("--model.transformer_impl=auto", "--model.dtype=bf16")
SHARDED = tuple(
    f"--parallel.{name}=true" for name in ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
)

# At the preset's rate the contrastive loss halves in its second step, a little sooner or later by rounding alone.
SLOWLY = "--contrastive.lr=1e-4"

Run = Callable[[Path, Path], Path]
"""Takes the folders of model and data and a new one for itself, where it returns the output's folder; there is a
``<output>.log`` of what was printed."""


def skip_without(recipe: str) -> None:
    """Skip a test whose FP8 recipe cannot run here."""
    try:
        resolve_implementation(ModelSettings(fp8=recipe))
    except ValueError as reason:
        pytest.skip(str(reason))


def complete(*more: str, recipe: str | None = None) -> Run:
    """All three stages, three steps each, the last at a small learning rate."""

    def run(folders: Path, folder: Path) -> Path:
        if recipe is not None:
            skip_without(recipe)
        output = folder / "output"
        done = train(folders, output, *BEST, SLOWLY, *_in_fp8(recipe), *more)
        output.with_suffix(".log").write_text(done.stdout + done.stderr)
        assert done.returncode == 0, done.stdout + done.stderr
        return output

    return run


def stopped(*more: str, recipe: str | None = None) -> Run:
    """Two stages on the distributed optimizer, stopped by SIGTERM and resumed; beside it lies an ``unbroken`` run."""

    def run(folders: Path, folder: Path) -> Path:
        if recipe is not None:
            skip_without(recipe)
        output, unbroken = folder / "output", folder / "unbroken"
        arguments = (*BEST, *SHARDED, *_in_fp8(recipe), *more)
        with contextlib.ExitStack() as ends:
            whole, process = (start(folders, path, *arguments) for path in (unbroken, output))
            for begun in (whole, process):
                ends.callback(finish, begun)
            # Before its first step: to look through all processes takes seconds beside tests that keep Python busy,
            # in which the stage could come to its end.
            ranks: list[psutil.Process] = []
            while not ranks:
                assert process.poll() is None, output.with_suffix(".log").read_text()[-3000:]
                time.sleep(0.1)
                with contextlib.suppress(psutil.NoSuchProcess):
                    ranks = ranks_of(process)
            wait_for_step(process, output, "bridge", 4)
            (rank,) = ranks
            rank.send_signal(signal.SIGTERM)
            assert finish(process) == 0 and finish(whole) == 0, unbroken.with_suffix(".log").read_text()[-3000:]
        assert len(losses(output, "bridge")) < len(losses(unbroken, "bridge"))
        assert finish(start(folders, output, *arguments)) == 0, output.with_suffix(".log").read_text()[-3000:]
        return output

    return run


def _in_fp8(recipe: str | None) -> tuple[str, ...]:
    return () if recipe is None else (f"--model.fp8={recipe}",)


PARAM, VISION = "--model.fp8_param=true", "--model.fp8_vision=true"
COMPLETE = {
    "bf16": complete("--evaluate", "--validation.interval=2"),
    "delayed": complete(recipe="delayed"),
    "delayed, tower too": complete(VISION, recipe="delayed"),
    "tensorwise": complete(recipe="tensorwise"),
    "tensorwise, tower too": complete(VISION, recipe="tensorwise"),
}
STOPPED = {
    "stopped": stopped(),
    "stopped, writing beside": stopped("--checkpoint.asynchronous=true"),
    "stopped in delayed": stopped(recipe="delayed"),
    "stopped in delayed, weights too": stopped(PARAM, recipe="delayed"),
    "stopped in tensorwise, weights too": stopped(PARAM, recipe="tensorwise"),
}
SLOW = ("delayed, tower too", "tensorwise", "stopped", "stopped in delayed")
"""Of them those whose parts the others have; run in the opt-in tier."""


def parameters(runs: Iterable[str]) -> list:
    """For ``parametrize("run", ...)``."""
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in runs]


def start_all(
    pool: ThreadPoolExecutor, names: set[str], folders: Path, new_folder: Callable[[str], Path]
) -> dict[str, Future[Path]]:
    """The outputs to come of these runs, the longest begun first."""
    return {
        name: pool.submit(run, folders, new_folder(name.replace(", ", "-").replace(" ", "-")))
        for name, run in {**STOPPED, **COMPLETE}.items()
        if name in names
    }
