"""Settings from a command line: ``--warmup.lr 1e-4`` or ``--warmup.lr=1e-4``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_origin

from jsonargparse import ArgumentError

from megatron_cocoa.settings.errors import SettingsError
from megatron_cocoa.settings.known_keys import known_keys, require_known
from megatron_cocoa.settings.options import options_parser
from megatron_cocoa.settings.values import as_records, spell, usable

_COMMAND_LINE = "command line"


def split_options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """``(key, value)`` of each ``--key value`` or ``--key=value``; ``("help", "")`` for ``-h`` and ``--help``.

    ``--with-baseline`` is ``--with_baseline``, and a switch without a value is on.
    """
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if token in ("-h", "--help"):
            yield "help", ""
            continue
        if not token.startswith("--"):
            raise SettingsError(f"{_COMMAND_LINE}: unexpected {token!r}, options are written --key value")
        typed, has_value, value = token[2:].partition("=")
        key = typed.replace("-", "_")
        if key not in ("preset", "config") and key not in known_keys():
            require_known(typed, _COMMAND_LINE, prefix="--")
        if not has_value:
            is_last = not tokens or tokens[0].startswith("--")
            if is_last and known_keys().get(key) is not bool:
                raise SettingsError(f"{_COMMAND_LINE}: --{key} has no value, write --{key} VALUE")
            value = "true" if is_last else tokens.pop(0)
        yield key, value


def read_command_line(given: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The settings among ``given`` by dotted key, with their types checked; ``preset`` and the like are none."""
    parser, values = options_parser(), {}
    for key, text in given:
        if key not in known_keys():
            continue
        with_type = known_keys()[key]
        if get_origin(with_type) is tuple and not text.startswith("["):
            text = f"[{text}]"
        try:
            found = usable(parser.parse_args([f"--{key}={text}"], defaults=False)[key], with_type)
            values[key] = as_records(found, with_type)
        except (ArgumentError, TypeError):
            raise SettingsError(f"{_COMMAND_LINE}: --{key} is {text!r}, needed {spell(with_type)}") from None
    return values
