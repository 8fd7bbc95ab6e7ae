"""The settings of a run in a file, which ``--config`` reads again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from megatron_cocoa.atomic import write_atomically
from megatron_cocoa.config import TrainSettings

SETTINGS_FILE = "settings.yaml"
"""What the settings of a run are saved as, in its output folder and in each complete stage's."""


def settings_to_dict(settings: TrainSettings) -> dict[str, Any]:
    """``settings`` as nested plain dicts, lists and scalars, for YAML or JSON."""
    return _plain(asdict(settings))


def _plain(value: Any) -> Any:
    """``value`` with lists in place of tuples, which YAML's safe dialect does not know."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def save_settings(settings: TrainSettings, path: str | Path) -> None:
    """Write every setting as YAML; ``--config`` on that file alone gives back equal settings.

    Raises:
        OSError: if ``path`` cannot be written.
    """
    # A run cannot be resumed without its settings: a full disk must not cost those that are there.
    text = yaml.safe_dump(settings_to_dict(settings), sort_keys=False, allow_unicode=True)
    write_atomically(Path(path), text)
