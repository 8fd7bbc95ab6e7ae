"""Free memory of a host and of a job, from trees of control groups as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from megatron_cocoa.parallel.host_memory import available_bytes


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("memory_", "memory.")).write_text(f"{content}\n")


def left(tmp_path: Path, membership: str) -> int:
    (tmp_path / "cgroup").write_text(membership)
    return available_bytes(groups=tmp_path, membership=tmp_path / "cgroup")


@pytest.fixture(autouse=True)
def host(monkeypatch):
    """A host with 1000 bytes free."""
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def test_a_job_has_what_its_groups_leave(tmp_path):
    """Claim: version 2's limits hold for a group and all above it; cached files count as free, "max" as no limit."""
    group(tmp_path / "slurm", memory_max=900, memory_current=500, memory_stat="anon 300\ninactive_file 200")
    group(tmp_path / "slurm" / "job", memory_max="max", memory_current=100, memory_stat="inactive_file 0")
    assert left(tmp_path, "0::/slurm/job\n") == 900 - 500 + 200
    group(tmp_path / "slurm" / "job", memory_max=150)
    assert left(tmp_path, "0::/slurm/job\n") == 50


def test_version_1_and_containers(tmp_path):
    """Claim: version 1's files are read as well, and a container's own mount where the path is the host's."""
    files = dict(memory_limit_in_bytes=700, memory_usage_in_bytes=600)
    files["memory_stat"] = "inactive_file 0\ntotal_inactive_file 20"
    group(tmp_path / "memory", **files)
    assert left(tmp_path, "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n") == 120


def test_without_limits_the_host_counts(tmp_path):
    """Claim: no groups, groups without limits, limits above what the host has and one that is used up."""
    assert available_bytes(groups=tmp_path, membership=tmp_path / "absent") == 1000
    assert left(tmp_path, "0::/\n") == 1000
    group(tmp_path / "job", memory_max=2**62, memory_current=5, memory_stat="inactive_file 0")
    assert left(tmp_path, "0::/job\n") == 1000
    group(tmp_path / "job", memory_max=4)
    assert left(tmp_path, "0::/job\n") == 0
