"""Whether a model folder describes the model that a checkpoint holds.

Shapes alone do not tell: rotary base, norm epsilon, windows or a tied head change what a model computes from weights
that fit.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.checkpoint.info import read_info
from megatron_cocoa.conversion.hf_to_mcore import config_of


def check_same_model(checkpoint: Path, folder: str | Path, architecture: QwenVLArchitecture) -> None:
    """Compare the architecture that ``folder`` describes with what a checkpoint says that it holds.

    Raises:
        ValueError: naming each number in which they differ.
    """
    own = config_of(read_info(checkpoint).hf_config, origin=f"the hf_config of {checkpoint}")
    ours, theirs = _numbers(QwenVLArchitecture.from_huggingface(own)), _numbers(architecture)
    differing = [f"{name} is {theirs[name]}, needed {ours[name]}" for name in ours if ours[name] != theirs[name]]
    if differing:
        raise ValueError(
            f"{folder} describes another model than {checkpoint} holds: {'; '.join(differing)}. Name the folder that "
            f"the model came from"
        )


def _numbers(architecture: QwenVLArchitecture) -> dict[str, Any]:
    """All fields of an architecture, those of the tower and of the language model as ``vision.depth`` and so on."""
    fields = asdict(architecture)
    parts = {name: fields.pop(name) for name in ("vision", "text")}
    return fields | {f"{part}.{name}": value for part, of_part in parts.items() for name, value in of_part.items()}
