"""What tests that start processes share: an environment and limits of their own."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NNODES", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT")


def environment(**more: str) -> dict[str, str]:
    """Of the outside without a launcher's variables, this interpreter's ``torchrun`` first on PATH, one thread."""
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        # Nothing is compiled there (model/compiled.py), but Megatron's decorators would import torch's compiler: a
        # second a process.
        own["TORCHDYNAMO_DISABLE"] = "1"
    return inherited | own | more


def full_disk_after(num_bytes: int) -> Callable[[], None]:
    """A ``preexec_fn`` that lets the process write no file larger than this: a write fails as on a full disk.

    Set in the started process alone: ranks that a test session starts in the background would inherit it.
    """

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    return limit
