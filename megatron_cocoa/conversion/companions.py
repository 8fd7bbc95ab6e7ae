"""Where the configuration, tokenizer and processor files of a Megatron checkpoint are."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from megatron_cocoa.checkpoint.import_hf import COMPANION_FOLDER
from megatron_cocoa.checkpoint.info import read_info
from megatron_cocoa.settings.saved import SETTINGS_FILE


def run_folder(checkpoint: Path) -> Path | None:
    """The output folder of the run that a checkpoint lies in, None if it lies in none.

    A run writes ``OUTPUT/settings.yaml``, ``OUTPUT/STAGE/checkpoint``, and further ones one level deeper.
    """
    return next((f for f in checkpoint.resolve().parents[:3] if (f / SETTINGS_FILE).is_file()), None)


def run_settings(checkpoint: Path) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint, see ``run_folder``; empty where there are none.

    Raises:
        ValueError: if they are not readable YAML.
    """
    folder = run_folder(checkpoint)
    if folder is None:
        return {}
    file = folder / SETTINGS_FILE
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not readable YAML: {error}") from error
    return content if isinstance(content, dict) else {}


def find_companions(checkpoint: Path) -> Path | None:
    """The folder that has a checkpoint's tokenizer: inside of it, or the one that its run's settings name."""
    carried = checkpoint / COMPANION_FOLDER
    named = (run_settings(checkpoint).get("model") or {}).get("path")
    for folder in (carried, *([Path(named)] if named else [])):
        if (folder / "tokenizer.json").is_file() and (folder / "config.json").is_file():
            return folder
    return carried if (carried / "config.json").is_file() else None


@contextmanager
def companion_folder(checkpoint: Path, named: str | Path | None) -> Iterator[Path]:
    """``named``, or what ``find_companions`` finds, or a folder with the checkpoint's configuration alone.

    Raises:
        ValueError: if the checkpoint has no configuration either.
    """
    found = Path(named) if named is not None else find_companions(checkpoint)
    if found is not None:
        yield found
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(read_info(checkpoint).hf_config), encoding="utf-8")
        yield Path(folder)
