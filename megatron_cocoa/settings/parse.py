"""From a command line to ``TrainSettings``.

Values come from four sources, of which a later one overrides an earlier one: the dataclass defaults of
``megatron_cocoa.config`` (the published recipe), a preset (``--preset NAME``, a YAML file in
``megatron_cocoa/presets``), each ``--config FILE`` in the order given, and the command line (``--warmup.lr 1e-4``).
jsonargparse converts and checks types and writes ``--help``; the dataclasses check relations between fields. Every
mistake becomes a ``SettingsError`` of one line that says where the value came from.

Nothing in this folder reads the environment or imports torch, so that a mistyped key fails within a fraction of a
second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cocoa.config import TrainSettings
from megatron_cocoa.settings.command_line import read_command_line, split_options
from megatron_cocoa.settings.errors import SettingsError, one_line
from megatron_cocoa.settings.known_keys import groups, known_keys
from megatron_cocoa.settings.options import print_help
from megatron_cocoa.settings.presets import PLAIN_DEFAULTS, TOY_PRESET, available_presets, preset_path
from megatron_cocoa.settings.yaml_file import read_yaml


def parse_settings(argv: Sequence[str], *, stand_ins: Mapping[str, Any] | None = None) -> TrainSettings:
    """The settings that ``argv`` (without the program's name) asks for.

    Args:
        stand_ins: values by dotted key, for settings that no source gives.

    Raises:
        SettingsError: for an unknown key (the nearest known one is named), a value of the wrong type, a file that
            cannot be read, a relation between fields that ``config`` refuses, or a missing model or data folder that
            the preset needs.
        SystemExit: with status 0 after ``--help``.
    """
    given = list(split_options(argv))
    chosen = [value for key, value in given if key == "preset"]
    preset = chosen[-1] if chosen else TOY_PRESET
    values = read_yaml(preset_path(preset)) if preset != PLAIN_DEFAULTS else {}
    configured: dict[str, Any] = {}
    for key, value in given:
        if key == "config":
            configured |= read_yaml(Path(value))
    values |= configured
    if ("help", "") in given:
        print_help(values, preset)
    values |= read_command_line(given)
    values |= {key: value for key, value in (stand_ins or {}).items() if values.get(key) is None}
    _require_recipe(values, preset, is_chosen=bool(chosen) or configured.keys() == known_keys().keys())
    return _build(values)


def _require_recipe(values: Mapping[str, Any], preset: str, *, is_chosen: bool) -> None:
    """Refuse a real model with the toy's recipe unless it was chosen, and a published preset without model or data."""
    if preset == TOY_PRESET and not is_chosen and values.get("model.path"):
        raise SettingsError(
            f"model.path is {values['model.path']} and no preset was chosen: add --preset NAME ("
            f"{', '.join([*available_presets(), PLAIN_DEFAULTS])}); --preset {TOY_PRESET} keeps the toy's recipe"
        )
    if preset not in (TOY_PRESET, PLAIN_DEFAULTS):
        for key in ("model.path", "data.path"):
            if not values.get(key) and not (key == "data.path" and values.get("data.sources")):
                raise SettingsError(f"preset {preset} needs --{key} FOLDER; only preset {TOY_PRESET} makes its own")


def _build(values: Mapping[str, Any]) -> TrainSettings:
    """Construct the dataclasses, and with that check the relations between fields."""
    arguments: dict[str, Any] = {key: value for key, value in values.items() if "." not in key}
    for group, cls in groups().items():
        inside = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{group}.")}
        try:
            arguments[group] = cls(**inside)
        except ValueError as error:
            where = "" if str(error).startswith(group) else f"{group}: "
            raise SettingsError(f"{where}{one_line(error)}") from None
    try:
        return TrainSettings(**arguments)
    except ValueError as error:
        raise SettingsError(one_line(error)) from None
