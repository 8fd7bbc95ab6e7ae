"""The converters as processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.e2e.processes import environment

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 900
"""Far above what any case needs: only a hang gets there."""

IMPORT, EXPORT = ROOT / "tools" / "convert_hf_to_mcore.py", ROOT / "tools" / "convert_mcore_to_hf.py"


def run(*command: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], env=environment(), capture_output=True, text=True, timeout=SECONDS, **options
    )


def python(script: Path, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, script, *arguments, **options)


def torchrun(ranks: int, script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks)
    return run(*launcher, script, *arguments)
