"""How much memory this host still has for this process, where a job may have been given less than the host has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_bytes(*, groups: Path = GROUPS, membership: Path = MEMBERSHIP) -> int:
    """What the host has free, or what the limits of this process's control groups leave, whichever is less.

    Pages of files that are kept in case they are read again count as free: the kernel gives them up.

    Args:
        groups: where the control groups are mounted, version 1 or 2.
        membership: the kernel's list of those that this process is in.
    """
    return min([psutil.virtual_memory().available, *_left_by_groups(groups, membership)])


def _left_by_groups(groups: Path, membership: Path) -> Iterator[int]:
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mount, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = groups / "memory"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # A limit of any group above holds as well. In a container the path may be the host's, and not be there.
        place = mount / path.lstrip("/")
        for group in (place, *place.parents):
            if group.is_relative_to(mount):
                yield from _left(group, *names)


def _left(group: Path, limit: str, used: str, files: str) -> Iterator[int]:
    try:
        largest = int((group / limit).read_text(encoding="ascii"))
        taken = int((group / used).read_text(encoding="ascii"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        # Not there, as for the topmost group, or "max": no limit.
        return
    yield max(0, largest - taken + int(statistics.get(files, 0)))
