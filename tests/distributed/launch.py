"""Starts the ranks once per turn and world size and hands every test its check's result.

Ranks take seconds to import, checks a fraction of one: so one launch runs all checks of a world size that the session
has selected; few have another turn than the first (see ``Check``). Launches follow one another in the background from
the session's start, while tests that need no ranks run, and tests that do come last. A failed or hanging check costs a
second launch for the checks after it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.distributed.check import all_checks

ROOT = Path(__file__).resolve().parents[2]
SECONDS_PER_CHECK = 200
"""A collective that waits for a lost rank gives up after two minutes and says where; this is for every other hang."""

MOST_LAUNCHES = 6
"""After as many failures the rest is given up: something is wrong with all of it."""

_shared = tempfile.TemporaryDirectory()
"""See ``check.shared_folder``."""

# More ranks than a machine has GPUs, and float32 bounds: these checks run on the CPU route everywhere. Taken once:
# tests that change their environment run while ranks start. On that route nothing is compiled (model/compiled.py), but
# Megatron's decorators would import torch's compiler: a second a rank.
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1", "SHARED_FOLDER": _shared.name}

_results: dict[tuple[int, int], Future[dict[str, dict]]] = {}
_processes: list[subprocess.Popen] = []
_background = ThreadPoolExecutor(1, "ranks")


def start(names: set[str]) -> None:
    """Run the checks, and those that they come after, in the background, one launch after the other."""
    checks = all_checks()
    names = names.union(*(checks[name].after for name in names))
    for launch in sorted({checks[name].launch for name in names}):
        selected = [name for name, check in checks.items() if name in names and check.launch == launch]
        _results[launch] = _background.submit(run_all, selected, launch[1])


def stop() -> None:
    """End what still runs; the session is over."""
    _background.shutdown(wait=False, cancel_futures=True)
    for process in _processes:
        process.terminate()


def some_slow(names: Iterable[str], slow: set[str]) -> list:
    """``names`` as parameters of a test, those in ``slow`` for the opt-in tier."""
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


def result_of(request: pytest.FixtureRequest, name: str) -> dict:
    """What check ``name`` returned on rank 0; fails the test with the ranks' tracebacks if it failed."""
    launch = all_checks()[name].launch
    world_size, found = launch[1], _results[launch].result() if launch in _results else {}
    if name not in found:
        # A test may compare with a check that the session did not select.
        found |= _background.submit(run_all, [name], world_size).result()
        _results[launch] = _background.submit(lambda: found)
    result = found[name]
    if "error" in result:
        pytest.fail(f"{name} on {world_size} rank(s):\n{result['error']}", pytrace=False)
    return result


def run_all(names: list[str], world_size: int) -> dict[str, dict]:
    """Results by name; a check that failed has an ``error``, and so have all that were given up after too many."""
    results: dict[str, dict] = {}
    for _ in range(MOST_LAUNCHES):
        remaining = [name for name in names if name not in results]
        if not remaining:
            return results
        with tempfile.TemporaryDirectory() as folder:
            results |= _launch(remaining, world_size, Path(folder))
    given_up = {"error": f"not run: {MOST_LAUNCHES} checks of {world_size} rank(s) failed before this one"}
    return results | {name: given_up for name in names if name not in results}


def _launch(names: list[str], world_size: int, folder: Path) -> dict[str, dict]:
    """One start of the ranks: all results up to the first failure, the failure included."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    command += [str(ROOT / "tests/distributed/worker.py"), "--output", str(folder), "--only", *names]
    log = folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, env=ENVIRONMENT)
        _processes.append(process)
        try:
            timed_out = _wait(process, folder)
        finally:
            # torchrun ends its ranks when it is asked to end; killed outright it would leave them behind.
            process.terminate()
            process.wait(timeout=60)
    written = folder / "results.json"
    results = json.loads(written.read_text()) if written.exists() else {}
    if timed_out or process.returncode:
        running = folder / "running"
        name = running.read_text() if running.exists() else names[0]
        failures = [f"--- {path.name} ---\n{path.read_text()}" for path in sorted(folder.glob("failed.*"))]
        why = f"no end within {SECONDS_PER_CHECK} seconds" if timed_out else "the ranks ended"
        tail = f"{why}:\n{log.read_text(errors='replace')[-6000:]}"
        results.setdefault(name, {"error": "\n".join(failures or [tail])})
    return results


def _wait(process: subprocess.Popen, folder: Path) -> bool:
    """Wait for the ranks; True where one check takes too long."""
    running, last_change, seen = folder / "running", time.monotonic(), None
    while process.poll() is None:
        time.sleep(0.2)
        now = running.read_text() if running.exists() else None
        if now != seen:
            seen, last_change = now, time.monotonic()
        elif time.monotonic() - last_change > SECONDS_PER_CHECK:
            return True
    return False
