"""What a checkpoint says of itself in ``cocoa.json``, read without Megatron."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_cocoa.checkpoint.torch_dist_reader import BACKEND_FILE
from megatron_cocoa.config import EmbeddingForm

INFO_FILE = "cocoa.json"

IMPORT_STAGE = "import"
"""``CheckpointInfo.stage`` of converted weights, which no stage has trained."""

OPTIMIZER_SHARDING = "fully_reshardable"
"""Megatron's form of optimizer state that loads at any data-parallel size."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds, beside its tensors.

    stage:          the stage that wrote it, or ``import`` for converted weights.
    step:           optimizer steps of that stage.
    mask_token_id, bridge_token_id: rows of the embedding that the model was trained with.
    loader:         the data loader's place.
    has_optimizer:  whether optimizer state is there.
    hf_config:      the Hugging Face ``config.json`` of the architecture.
    progress:       the trainer's counters, to resume from; empty where there is nothing to resume.
    attention, image_placeholder: the form that it embeds in, see ``config.EmbeddingForm``.
    pictures:       ``image_size``, ``min_image_tokens`` and ``max_image_tokens`` of the stage; empty where no stage
                    has trained the weights.
    """

    stage: str
    step: int
    mask_token_id: int
    bridge_token_id: int
    hf_config: dict[str, Any]
    loader: dict[str, Any] = field(default_factory=dict)
    has_optimizer: bool = False
    progress: dict[str, Any] = field(default_factory=dict)
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    image_placeholder: Literal["full", "bare"] = "full"
    pictures: dict[str, int | None] = field(default_factory=dict)

    @property
    def embedding_form(self) -> EmbeddingForm:
        """The form that it embeds in."""
        return EmbeddingForm(self.attention, self.image_placeholder)


def is_complete(path: Path) -> bool:
    """Whether a folder holds both what Megatron writes last and our description, and both are whole.

    Raises:
        OSError: where that is not to be seen, as on a shared file system that fails for a while. Taken for none, a
            complete checkpoint would be trained again, and written over.
    """
    try:
        for name in (INFO_FILE, BACKEND_FILE):
            json.loads((path / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return True


def read_info(path: str | Path) -> CheckpointInfo:
    """What a checkpoint holds.

    Raises:
        ValueError: if the folder is no complete checkpoint of this project.
    """
    folder = Path(path)
    try:
        is_whole = is_complete(folder)
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error}") from error
    if not is_whole:
        refuse_folder_around(folder)
        state = "is incomplete or no checkpoint of megatron_cocoa" if folder.is_dir() else "does not exist"
        raise ValueError(f"{folder} {state}: needed a folder with {BACKEND_FILE} and {INFO_FILE}")
    try:
        return CheckpointInfo(**json.loads((folder / INFO_FILE).read_text(encoding="utf-8")))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / INFO_FILE} is not what this version writes: {error}") from error


def refuse_folder_around(source: str | Path) -> None:
    """Refuse a run's or a stage's folder where a checkpoint is needed.

    Raises:
        ValueError: naming the checkpoints in it.
    """
    source = Path(source)
    inside = [str(f) for depth in ("", "*/") for f in sorted(source.glob(f"{depth}checkpoint")) if is_complete(f)]
    if inside and not is_complete(source):
        raise ValueError(f"{source} is a folder around checkpoints: name one of them, {' or '.join(inside)}")
