"""A run that is ended from outside: by a signal, by the death of a rank, by a full disk; and what it goes on with."""

import json
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.training.stage_checkpoints import complete_steps
from tests.e2e.processes import environment, full_disk_after
from tests.e2e.test_launch import ROOT, SCRIPT

STEPS, INTERVAL = 12, 3
KILLS, KILL_STEPS = 20, 66
SECONDS = 300
"""Far above what a run needs; only a hang gets there."""


def start(
    folders: Path, output: Path, *arguments: str, ranks: int = 1, restarts: int = 0, **options
) -> subprocess.Popen:
    """The run as a user starts it; its output goes to ``<output>.log``."""
    sizes = [
        f"--{stage}.{name}={value}"
        for stage in ("bridge", "contrastive")
        for name, value in (
            ("steps", STEPS), ("lr_warmup_steps", 1), ("global_batch_size", 8), ("micro_batch_size", 2),
        )
    ]  # fmt: skip
    command = [
        "torchrun", "--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", str(ROOT / SCRIPT),
        "--preset=toy", f"--model.path={folders / 'model'}", f"--data.path={folders / 'pairs'}", "--log_interval=1",
        f"--output_dir={output}", "--stages=[bridge,contrastive]", f"--checkpoint.save_interval={INTERVAL}",
        "--resume=true", *sizes, *arguments,
    ]  # fmt: skip
    with output.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            command, cwd=folders, env=environment(), stdout=log, stderr=subprocess.STDOUT, **options
        )


def finish(process: subprocess.Popen) -> int:
    try:
        return process.wait(timeout=SECONDS)
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
            child.kill()
        process.kill()


def losses(output: Path, stage: str) -> list[float]:
    path = output / stage / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def wait_for_step(process: subprocess.Popen, output: Path, stage: str, step: int) -> None:
    """Return once the run has written the step; whether its checkpoint is complete is left to chance."""
    path, deadline = output / stage / "metrics.jsonl", time.monotonic() + SECONDS
    while not path.is_file() or path.read_bytes().count(b"\n") < step:
        assert process.poll() is None and time.monotonic() < deadline, output.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.01)


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children() if "pretrain_cocoa.sh" in " ".join(p.cmdline())]


@pytest.fixture(scope="module")
def unbroken(tiny_folders, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "output"
    assert finish(start(tiny_folders, output)) == 0, output.with_suffix(".log").read_text()[-3000:]
    return output


def assert_same_run(output: Path, unbroken: Path) -> None:
    for stage in ("bridge", "contrastive"):
        assert losses(output, stage) == losses(unbroken, stage) and len(losses(output, stage)) == STEPS
        assert (output / stage / "checkpoint" / "cocoa.json").is_file()
        assert not list((output / stage).glob("checkpoints/*"))


def test_a_killed_rank_and_a_signal_cost_no_step(tiny_folders, unbroken, tmp_path):
    """Claim: the run that was killed in one stage and ended by SIGTERM in the other ends where an unbroken one ends.

    With --max-restarts and --resume it goes on by itself after a kill, from its last complete checkpoint; nothing of
    the killed rank lives on, the writers of its last checkpoint and the process behind them included. The signal
    leaves a checkpoint of the last step and status 0, also where a batch system sends it to every process of the job.
    """
    output = tmp_path / "output"
    more = "--checkpoint.asynchronous=true", "--data.num_workers=1"
    process = start(tiny_folders, output, *more, restarts=1)
    wait_for_step(process, output, "bridge", INTERVAL + 1)
    while not complete_steps(output / "bridge" / "checkpoints"):
        assert process.poll() is None, output.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.01)
    (rank,) = ranks_of(process)
    helpers = rank.children(recursive=True)
    rank.kill()
    wait_for_step(process, output, "contrastive", 4)
    (rank,) = ranks_of(process)
    for part in (rank, *rank.children(recursive=True)):
        part.send_signal(signal.SIGTERM)
    assert finish(process) == 0, output.with_suffix(".log").read_text()[-3000:]
    # A data worker looks for its rank every five seconds, in which a fast machine runs both stages.
    _, left = psutil.wait_procs(helpers, timeout=20)
    assert not left, f"processes of a killed rank that live on: {left}"
    done = len(losses(output, "contrastive"))
    text = output.with_suffix(".log").read_text()
    assert f"Stopped in stage contrastive after step {done} of {STEPS} (signal SIGTERM)" in text
    assert 4 <= done < STEPS and complete_steps(output / "contrastive" / "checkpoints")[-1] == done
    assert finish(start(tiny_folders, output)) == 0
    after_kill, after_signal = re.findall(r"(\w+) goes on after step (\d+)", output.with_suffix(".log").read_text())
    assert after_kill[0] == "bridge" and int(after_kill[1]) % INTERVAL == 0 < int(after_kill[1])
    assert after_signal == ("contrastive", str(done))
    assert_same_run(output, unbroken)


def contents(output: Path) -> dict[Path, bytes]:
    """Of its files, but for TensorBoard's: a thread may still write the last step's event after the step."""
    files = (path for path in output.rglob("*") if path.is_file() and path.parent.name != "tensorboard")
    return {path: path.read_bytes() for path in files}


def test_another_start_and_the_death_of_a_rank_end_all_ranks(tiny_folders, tmp_path):
    """Claim: a run that hangs, and is started a second time in its folder, ends on all ranks when it wakes up.

    It touches no file any more, and the second run goes on, from the last checkpoint. Of that one a rank dies: nobody
    waits for a rank that is gone, and the message says which one and how.
    """
    output, log = tmp_path / "output", tmp_path / "output.log"
    layout = "--parallel.tensor_model_parallel_size=2"
    hanging = start(tiny_folders, output, layout, ranks=2)
    wait_for_step(hanging, output, "bridge", INTERVAL + 1)
    ranks = ranks_of(hanging)
    for rank in ranks:
        rank.suspend()
    done = complete_steps(output / "bridge" / "checkpoints")[-1]
    process = start(tiny_folders, output, layout, ranks=2)
    deadline = time.monotonic() + SECONDS
    while f"Resumed: bridge goes on after step {done}" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.01)
    newer = ranks_of(process)
    for rank in newer:
        rank.suspend()
    before = contents(output)
    for rank in ranks:
        rank.resume()
    assert finish(hanging) != 0
    assert not any(is_alive(rank) for rank in ranks) and contents(output) == before
    text = log.read_text()
    assert f"error: another run has started in output_dir {output}" in text, text[-3000:]
    assert re.search(r"exitcode\s*: 2 ", text)
    for rank in newer:
        rank.resume()
    wait_for_step(process, output, "bridge", done + INTERVAL + 1)
    newer[1].kill()
    killed = time.monotonic()
    assert finish(process) != 0
    assert time.monotonic() - killed < 60, "torchrun gives the other ranks 30 seconds to end"
    assert not any(is_alive(rank) for rank in newer)
    assert losses(output, "bridge") and re.search(r"exitcode\s*: -9", log.read_text())


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_full_disk_at_a_checkpoint_ends_all_ranks_with_one_message(tiny_folders, tmp_path):
    """Claim: a write in the background that fails on any rank fails on all, and leaves nothing half-written.

    A limit on file size stands for the full disk: the write fails in the same place, with an OSError.
    """
    output = tmp_path / "output"
    full = full_disk_after(300_000)
    process = start(tiny_folders, output, "--checkpoint.asynchronous=true", ranks=2, preexec_fn=full)
    assert finish(process) != 0
    text = output.with_suffix(".log").read_text()
    assert "could not be written, nothing was kept of it; free space on its disk" in text, text[-3000:]
    assert re.search(r"exitcode\s*: 2 ", text)
    assert not list((output / "bridge" / "checkpoints").iterdir())


def steps_done(output: Path) -> int:
    """Steps that the run has logged, over both stages."""
    return sum(path.read_bytes().count(b"\n") for path in output.glob("*/metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_twenty_kills_lose_nothing_but_time(tiny_folders, tmp_path, asynchronous):
    """Claim: killed at random moments, writes of checkpoints included, the run ends bit for bit like an unbroken one.

    Every start goes on from the last checkpoint that was complete at the kill; none loads a torn one. Both stages are
    cut into equal parts with one kill in each, so that kills are spread over all of the run.
    """
    options = [f"--{stage}.steps={KILL_STEPS}" for stage in ("bridge", "contrastive")]
    options += [f"--checkpoint.asynchronous={asynchronous}"]
    unbroken, output, chance = tmp_path / "unbroken", tmp_path / "output", random.Random(7)
    assert finish(start(tiny_folders, unbroken, *options)) == 0
    log, kills, torn = output.with_suffix(".log"), [], 0
    part = 2 * KILL_STEPS / (KILLS + 1)
    for number in range(KILLS):
        size = log.stat().st_size if log.is_file() else 0
        target, delay = int(part * (number + chance.random())), chance.uniform(0.0, 0.6)
        process = start(tiny_folders, output, *options)
        # The log of steps is cut back to the checkpoint before training starts.
        while process.poll() is None and ("step/s" not in log.read_text()[size:] or steps_done(output) < target):
            time.sleep(0.01)
        time.sleep(delay)
        ranks = ranks_of(process) if process.poll() is None else []
        assert ranks, f"the run ended before kill {number + 1}:\n{log.read_text()[-3000:]}"
        # The rank first: whatever it has started may go on for a moment, as after any kill.
        started = ranks[0].children(recursive=True)
        ranks[0].kill()
        process.kill()
        process.wait()
        torn += any(path.suffix for path in output.glob("*/checkpoint*/*") if path.name.startswith("step-"))
        kills.append(steps_done(output))
        left = {path.parent.name: complete_steps(path) for path in output.glob("*/checkpoints")}
        for stage, steps in left.items():
            done = len((output / stage / "metrics.jsonl").read_bytes().splitlines())
            is_complete = (output / stage / "checkpoint" / "cocoa.json").is_file()
            slack = 2 * INTERVAL if asynchronous == "true" else INTERVAL
            assert is_complete or done - (steps[-1] if steps else 0) <= slack + 1, (stage, done, steps)
        if chance.random() < 0.5:
            psutil.wait_procs(started, timeout=20)
    assert finish(start(tiny_folders, output, *options)) == 0
    print(f"kills after steps {kills} of {2 * KILL_STEPS}, {torn} while a checkpoint was being written or removed")
    assert kills[0] < KILL_STEPS < kills[-1] and len(set(kills)) > KILLS // 2
    for stage in ("bridge", "contrastive"):
        assert losses(output, stage) == losses(unbroken, stage) and len(losses(output, stage)) == KILL_STEPS
        with TorchDistReader(unbroken / stage / "checkpoint") as a, TorchDistReader(output / stage / "checkpoint") as b:
            assert all(torch.equal(a.read(key), b.read(key)) for key in a.keys() if "_extra_state" not in key)


@pytest.mark.slow
def test_memory_stays_flat(tiny_folders, tmp_path):
    """Claim: 2,000 steps of stage 3 with pictures of many sizes end within 5% of the resident memory at step 200."""
    rng, output = random.Random(3), tmp_path / "output"
    data = tmp_path / "pairs"
    shutil.copytree(tiny_folders / "pairs", data)
    for picture in (data / "images").iterdir():
        with Image.open(picture) as image:
            image.resize((14 * rng.randint(2, 16), 14 * rng.randint(2, 16))).save(picture)
    process = start(
        tiny_folders, output, f"--data.path={data}", "--stages=[contrastive]", "--contrastive.steps=2000",
        "--checkpoint.save_interval=500",
    )  # fmt: skip
    assert process.wait(timeout=3600) == 0, output.with_suffix(".log").read_text()[-3000:]
    lines = [json.loads(line) for line in (output / "contrastive" / "metrics.jsonl").read_text().splitlines()]
    early, late = lines[199]["memory_gib"], lines[1999]["memory_gib"]
    print(f"resident memory {early:.3f} GiB at step 200, {late:.3f} GiB at step 2,000")
    assert late <= 1.05 * early
