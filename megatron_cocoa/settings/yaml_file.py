"""Settings from a YAML file: a preset, or a file that ``--config`` names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError

from megatron_cocoa.settings.errors import SettingsError, one_line
from megatron_cocoa.settings.known_keys import groups, known_keys, require_known
from megatron_cocoa.settings.options import options_parser
from megatron_cocoa.settings.values import as_records, check_records, spell, usable


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file by dotted key, with their types checked."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"config file {path} cannot be read: {one_line(error)}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"config file {path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(tree, dict | None):
        raise SettingsError(f"config file {path} holds {type(tree).__name__}, needed a mapping of settings")
    parser, values = options_parser(), {}
    for key, value in _flatten(tree or {}, str(path)):
        with_type = known_keys()[key]
        try:
            check_records(key, value, with_type, str(path))
            found = usable(parser.parse_object({key: value}, defaults=False)[key], with_type)
            values[key] = as_records(found, with_type)
        except (ArgumentError, TypeError):
            raise SettingsError(f"{path}: {key} is {value!r}, needed {spell(with_type)}") from None
    return values


class _EachKeyOnce(yaml.SafeLoader):
    """YAML's safe dialect, which has each key once; PyYAML keeps the last of two and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _flatten(tree: Mapping[Any, Any], source: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``(dotted key, value)`` of each leaf; refuses keys that no setting has."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in groups() and isinstance(value, Mapping):
            yield from _flatten(value, source, f"{key}.")
        else:
            require_known(key, source)
            yield key, value
