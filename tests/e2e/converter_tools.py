"""The converters as processes, and the small models that the tests give them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from megatron_cocoa.checkpoint.convert import same_bits
from megatron_cocoa.checkpoint.huggingface import HuggingFaceReader
from tests.e2e.processes import environment
from tests.parity.reference import tiny_config, tiny_huggingface

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


def write_model(folder: Path, family: str = "qwen2_5_vl", tied: bool = True, dtype=torch.float32) -> Path:
    tiny_huggingface(tiny_config(family, tied=tied), dtype=dtype).save_pretrained(folder)
    return folder


def assert_same_weights(first: Path, second: Path) -> None:
    with HuggingFaceReader(first) as a, HuggingFaceReader(second) as b:
        assert set(a.keys()) == set(b.keys())
        assert [name for name in a.keys() if not same_bits(a.get(name), b.get(name))] == []
