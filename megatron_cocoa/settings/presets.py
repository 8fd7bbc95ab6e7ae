"""The presets that ship with the package: a YAML file of settings for each model and its layout."""

from __future__ import annotations

from pathlib import Path

from megatron_cocoa.settings.errors import SettingsError
from megatron_cocoa.settings.known_keys import nearest

PRESETS_DIR = Path(__file__).resolve().parents[1] / "presets"
PLAIN_DEFAULTS = "none"
"""The preset name that stands for the dataclass defaults alone."""
TOY_PRESET = "toy"
"""The one preset that needs neither a model nor a data folder: the entry point prepares both."""


def available_presets() -> list[str]:
    """Names that ``--preset`` takes besides ``none``."""
    return sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))


def preset_path(name: str) -> Path:
    """The file of a preset; refuses a name that none has."""
    names = [*available_presets(), PLAIN_DEFAULTS]
    if name not in names:
        raise SettingsError(f"unknown preset {name!r}{nearest(name, names)} (choose from {', '.join(names)})")
    return PRESETS_DIR / f"{name}.yaml"
