"""The settings as jsonargparse's options, which convert and check types, and ``--help``, which lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from megatron_cocoa.config import TrainSettings
from megatron_cocoa.settings.known_keys import groups, known_keys
from megatron_cocoa.settings.presets import PLAIN_DEFAULTS, available_presets


@cache
def options_parser() -> ArgumentParser:
    """The parser that converts and checks values; ``--help`` has one of its own, whose defaults it changes."""
    return _new_options_parser()


def _new_options_parser() -> ArgumentParser:
    """One jsonargparse option per setting, documented from the dataclasses' docstrings."""
    parser = ArgumentParser(prog="pretrain_cocoa.sh", exit_on_error=False, usage="%(prog)s [--key value ...]")
    documented = {"": (TrainSettings, parser)}
    for group, cls in groups().items():
        summary = (cls.__doc__ or "").partition("\n")[0]
        documented[group] = (cls, parser.add_argument_group(group, summary))
    for key, hint in known_keys().items():
        group, _, name = key.rpartition(".")
        cls, target = documented[group]
        default = {field.name: field.default for field in fields(cls)}[name]
        target.add_argument(f"--{key}", type=hint, default=default, help=_field_help(cls).get(name, ""))
    return parser


def print_help(values: Mapping[str, Any], preset: str) -> NoReturn:
    """Print every option with the default that the chosen preset and files give it, and leave."""
    parser = _new_options_parser()
    parser.set_defaults(dict(values))
    parser.description = (
        f"Train Qwen2-VL or Qwen2.5-VL as a multimodal embedding model. --preset NAME (now {preset}) is one of "
        f"{', '.join([*available_presets(), PLAIN_DEFAULTS])}; --config FILE.yaml may be repeated. Each of "
        "these overrides the ones before it: published defaults, preset, config files, command line. Defaults below "
        "are those of the chosen preset."
    )
    parser.print_help()
    raise SystemExit(0)


def _field_help(cls: type) -> dict[str, str]:
    """What the ``Args:`` of ``cls`` and its parents say of each field, on one line."""
    texts: dict[str, str] = {}
    for parent in reversed(cls.__mro__[:-1]):
        names: list[str] = []
        for line in (parent.__doc__ or "").partition("Args:\n")[2].splitlines():
            indent = len(line) - len(line.lstrip())
            if indent == 8:
                head, _, text = line.strip().partition(": ")
                names = head.split(", ")
                texts |= dict.fromkeys(names, text)
            elif line.strip():
                texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    # argparse expands % in help texts.
    return {name: text.replace("``", "").replace("%", "%%") for name, text in texts.items()}
