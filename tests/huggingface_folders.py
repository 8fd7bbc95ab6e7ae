"""Small Hugging Face folders, and their comparison, for tests of the converters."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_cocoa.checkpoint.bits import same_bits
from megatron_cocoa.checkpoint.huggingface import HuggingFaceReader
from tests.parity.reference import tiny_config, tiny_huggingface


def write_model(folder: Path, family: str = "qwen2_5_vl", tied: bool = True, dtype=torch.float32) -> Path:
    """A tiny model's config and weights in ``folder``, which is returned."""
    tiny_huggingface(tiny_config(family, tied=tied), dtype=dtype).save_pretrained(folder)
    return folder


def different_weights(first: Path, second: Path) -> list[str]:
    """Names of tensors that one folder lacks or that differ in any bit."""
    with HuggingFaceReader(first) as a, HuggingFaceReader(second) as b:
        names, others = set(a.keys()), set(b.keys())
        return sorted(names ^ others) + [n for n in sorted(names & others) if not same_bits(a.get(n), b.get(n))]
