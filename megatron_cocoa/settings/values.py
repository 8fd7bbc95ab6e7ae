"""What jsonargparse's check of a value leaves: values that no setting means, lists of records, types in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from megatron_cocoa.settings.errors import SettingsError
from megatron_cocoa.settings.known_keys import nearest


def usable(value: Any, hint: Any) -> Any:
    """``value``, unless it is one that jsonargparse lets pass and that no setting means.

    None where ``hint`` has none; an empty text, as a shell variable that is not set leaves it; a number without end.
    """
    if value is None and NoneType not in get_args(hint):
        raise TypeError("null")
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if item == "" or (isinstance(item, float) and not math.isfinite(item)):
            raise TypeError(f"{item!r}")
    return value


def spell(hint: Any) -> str:
    """A field's type for a reader of an error message."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(spell(member) for member in get_args(hint))
    if get_origin(hint) is tuple:
        record = get_args(hint)[0]
        if is_dataclass(record):
            return f"a list of records with the keys {', '.join(field.name for field in fields(record))}"
        return "a list of names" if record is str else "a list of numbers"
    if get_origin(hint) is dict:
        return "a mapping of names to names"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}[hint]


def check_records(key: str, value: Any, hint: Any, source: str) -> None:
    """Refuse a list of records by the entry and key that is misspelled, missing or of another type."""
    record = get_args(hint)[0] if get_origin(hint) is tuple else None
    if not is_dataclass(record) or not isinstance(value, list):
        return
    types = get_type_hints(record)
    needed = [field.name for field in fields(record) if field.default is MISSING and field.default_factory is MISSING]
    for number, entry in enumerate(value):
        if not isinstance(entry, Mapping):
            continue
        where = f"{source}: {key}[{number}]"
        for name, found in entry.items():
            if name not in types:
                raise SettingsError(f"{where}: unknown setting {name}{nearest(str(name), list(types))}")
            try:
                usable(_record_parser(record).parse_object({name: found}, defaults=False)[name], types[name])
            except (ArgumentError, TypeError):
                raise SettingsError(f"{where}.{name} is {found!r}, needed {spell(types[name])}") from None
        missing = [name for name in needed if name not in entry]
        if missing:
            raise SettingsError(f"{where} has no {' and no '.join(missing)}: each record needs {' and '.join(needed)}")


@cache
def _record_parser(record: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    for name, hint in get_type_hints(record).items():
        parser.add_argument(f"--{name}", type=hint)
    return parser


def as_records(value: Any, hint: Any) -> Any:
    """A list of records as instances of their dataclass, with its defaults; any other value as it is."""
    record = get_args(hint)[0] if get_origin(hint) is tuple else None
    if not is_dataclass(record):
        return value
    return tuple(item if is_dataclass(item) else record(**item.as_dict()) for item in value)
