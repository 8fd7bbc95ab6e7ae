"""The Slurm script, run under stand-ins for Slurm's commands: what it starts, and how it ends in time."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "slurm_cocoa.sbatch"

SCONTROL = """
if [ "$1 $2" = "show hostnames" ]; then printf '%s\\n' node-a node-b node-c node-d | head -n "$SLURM_JOB_NUM_NODES"; fi
echo "$@" >>"$RECORD/scontrol"
"""
# Options of its own up to the command, then one task a node, of which any failure is srun's.
SRUN = """
echo "$@" >"$RECORD/srun"
while [ "${1#--}" != "$1" ]; do shift; done
tasks=
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node SLURMD_NODENAME=node-$(echo "$node" | tr 0-3 a-d) "$@" &
    tasks="$tasks $!"
done
echo $tasks >"$RECORD/tasks"
status=0
for task in $tasks; do wait "$task" || status=$?; done
exit $status
"""
# As Slurm does, the signal goes to every process of a task: launcher and ranks as well.
SCANCEL = """
echo "$@" >>"$RECORD/scancel"
for task in $(cat "$RECORD/tasks"); do
    for child in $(cat /proc/$task/task/*/children); do
        kill -USR1 $(cat /proc/$child/task/*/children) "$child"
    done
    kill -USR1 "$task"
done
"""
TORCHRUN = """
printf '%s\\n' "$@" >"$RECORD/torchrun.$SLURM_NODEID"
echo "$PET_LOCAL_ADDR" >"$RECORD/address.$SLURM_NODEID"
"""
# A launcher that would end by TERM, and two ranks that save when TERM reaches them.
WAITING_TORCHRUN = """
trap 'echo killed >>"$RECORD/launcher"; exit 1' TERM
for rank in 0 1; do
    bash -c 'trap "echo saved >\\"$RECORD/saved.$SLURM_NODEID.$0\\"; exit ${SAVE_STATUS:-0}" TERM
             echo up >"$RECORD/up.$SLURM_NODEID.$0"; while true; do sleep 0.05; done' $rank &
    ranks="$ranks $!"
done
for rank in $ranks; do wait $rank || exit $?; done
"""


@pytest.fixture
def cluster(tmp_path):
    """Starts the script as a job; Slurm's commands record how they were called."""

    def start(*arguments: str, nodes: int = 1, torchrun: str = TORCHRUN, **environment: str) -> subprocess.Popen:
        commands = tmp_path / "bin"
        commands.mkdir()
        texts = {"scontrol": SCONTROL, "srun": SRUN, "scancel": SCANCEL, "torchrun": torchrun}
        for name, text in texts.items():
            path = commands / name
            path.write_text(f"#!/usr/bin/env bash\n{text}", encoding="utf-8")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        job = {
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node-[a-d]",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "96",
            "SLURM_SUBMIT_DIR": str(ROOT / "examples"),
            "RECORD": str(tmp_path),
        }
        variables = os.environ | job | environment | {"PATH": f"{commands}:{os.environ['PATH']}"}
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def end(job: subprocess.Popen) -> str:
    """Wait for the job's end; its output."""
    output, _ = job.communicate(timeout=60)
    return output


def wait_for(paths: list[Path]) -> None:
    deadline = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"not all of {paths} appeared"
        time.sleep(0.05)


@pytest.mark.parametrize("nodes", [1, 4])
def test_every_node_runs_the_same_torchrun(cluster, tmp_path, nodes):
    """Claim: nodes meet at the first host, each starts a rank a GPU, and options arrive as they were given.

    Each goes by the name by which Slurm knows it, and its ranks have all the cores that the job has there.
    """
    job = cluster("--preset", "qwen2.5-vl-3b", "--output_dir", "/with a space", nodes=nodes)
    output = end(job)
    assert job.returncode == 0, output
    wanted = [
        "--nnodes", str(nodes), "--nproc-per-node", "8", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"node-a:{20000 + 123456 % 20000}", "--rdzv-id", "123456-0",
        "--rdzv-conf", "read_timeout=600", "--max-restarts", "3", "examples/pretrain_cocoa.sh",
        "--preset", "qwen2.5-vl-3b", "--output_dir", "/with a space", "--resume", "true",
    ]  # fmt: skip
    for node in range(nodes):
        assert (tmp_path / f"torchrun.{node}").read_text().splitlines() == wanted
        assert (tmp_path / f"address.{node}").read_text() == f"node-{'abcd'[node]}\n"
    assert "--cpus-per-task=96" in (tmp_path / "srun").read_text().split()
    assert "requeue" not in (tmp_path / "scontrol").read_text(), "a job that is done stays done"


def test_settings_by_environment(cluster, tmp_path):
    """Claim: GPU types before the count, restarts, ports, resume and containers are taken from the environment."""
    job = cluster(
        SLURM_GPUS_ON_NODE="h100:4",
        MAX_RESTARTS="1",
        RDZV_PORT="29999",
        RESUME="0",
        CONTAINER="image.sqsh",
        SLURM_RESTART_COUNT="2",
    )
    assert end(job) == "" and job.returncode == 0
    found = (tmp_path / "torchrun.0").read_text().split()
    assert found[found.index("--nproc-per-node") + 1] == "4" and found[found.index("--max-restarts") + 1] == "1"
    assert found[found.index("--rdzv-endpoint") + 1] == "node-a:29999"
    assert found[found.index("--rdzv-id") + 1] == "123456-2", "a requeued job meets anew"
    assert found[-1] == "examples/pretrain_cocoa.sh"
    step = (tmp_path / "srun").read_text()
    assert f"--container-image=image.sqsh --container-mounts={ROOT}:{ROOT} --container-workdir={ROOT}" in step


@pytest.mark.parametrize("save_status", ["0", "7"])
def test_the_ranks_save_before_the_time_ends(cluster, tmp_path, save_status):
    """Claim: Slurm's TERM reaches every rank and not torchrun, the script waits for them and queues the job again.

    Also where saving fails: the last complete checkpoint is what the requeued job goes on from.
    """
    job = cluster(nodes=2, torchrun=WAITING_TORCHRUN, SAVE_STATUS=save_status)
    ranks = [f"{node}.{rank}" for node in range(2) for rank in range(2)]
    wait_for([tmp_path / f"up.{rank}" for rank in ranks])
    job.send_signal(signal.SIGTERM)
    output = end(job)
    assert job.returncode == 0, output
    assert all((tmp_path / f"saved.{rank}").exists() for rank in ranks), output
    assert not (tmp_path / "launcher").exists(), "torchrun must not get the signal: it kills ranks that take long"
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "requeue 123456"
    assert ("ended with status 7" in output) == (save_status == "7")


def test_preemption_leaves_the_ranks_time_to_save(cluster, tmp_path):
    """Claim: TERM to a node's shell, as Slurm sends it before it takes the nodes away, ends no rank that saves."""
    job = cluster(torchrun=WAITING_TORCHRUN)
    wait_for([tmp_path / "up.0.0", tmp_path / "up.0.1"])
    for task in (tmp_path / "tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    assert job.wait(timeout=60) == 0
    assert (tmp_path / "saved.0.0").exists() and (tmp_path / "saved.0.1").exists()


def test_a_job_is_not_queued_again_for_ever(cluster, tmp_path):
    """Claim: MAX_REQUEUES ends a job that never finishes, with a line that says so."""
    job = cluster(torchrun=WAITING_TORCHRUN, SLURM_RESTART_COUNT="2", MAX_REQUEUES="2")
    wait_for([tmp_path / "up.0.0", tmp_path / "up.0.1"])
    job.send_signal(signal.SIGTERM)
    assert "MAX_REQUEUES allows no more" in end(job)
    assert "requeue" not in (tmp_path / "scontrol").read_text()


def test_a_failed_run_fails_the_job(cluster, tmp_path):
    """Claim: an error is no reason to queue again, and its status is the job's."""
    job = cluster(torchrun="exit 3")
    end(job)
    assert job.returncode == 3
    assert "requeue" not in (tmp_path / "scontrol").read_text()


def test_submitting_from_elsewhere_is_refused(cluster, tmp_path):
    """Claim: a job that cannot find the training script says so at once."""
    job = cluster(SLURM_SUBMIT_DIR=str(tmp_path))
    assert "submit from the repository" in end(job) and job.returncode == 2


def test_the_script_is_valid_shell():
    """Claim: bash reads it, and shellcheck (where it is installed) finds nothing."""
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
