"""From a command line to ``TrainSettings``.

Values come from four sources, of which a later one overrides an earlier one: the dataclass defaults of
``megatron_cocoa.config`` (the published recipe), a preset (``--preset NAME``, a YAML file in
``megatron_cocoa/presets``), each ``--config FILE`` in the order given, and the command line (``--warmup.lr 1e-4``).
jsonargparse converts and checks types and writes ``--help``; the dataclasses check relations between fields. Every
mistake becomes a ``SettingsError`` of one line that says where the value came from.

Nothing here reads the environment or imports torch, so that a mistyped key fails within a fraction of a second.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from megatron_cocoa.atomic import write_atomically
from megatron_cocoa.config import TrainSettings

PRESETS_DIR = Path(__file__).resolve().parent / "presets"
PLAIN_DEFAULTS = "none"
"""The preset name that stands for the dataclass defaults alone."""
TOY_PRESET = "toy"
"""The one preset that needs neither a model nor a data folder: the entry point prepares both."""

SETTINGS_FILE = "settings.yaml"
"""What the settings of a run are saved as, in its output folder and in each complete stage's."""

_COMMAND_LINE = "command line"


class SettingsError(ValueError):
    """A mistake in the settings that a user can correct; the message is one line.

    Entry points print it on rank 0 and exit with status 2.
    """


def parse_settings(
    argv: Sequence[str], *, preset_default: str = TOY_PRESET, stand_ins: Mapping[str, Any] | None = None
) -> TrainSettings:
    """The settings that ``argv`` (without the program's name) asks for.

    Args:
        preset_default: the preset where ``argv`` names none.
        stand_ins: values by dotted key, for settings that no source gives.

    Raises:
        SettingsError: for an unknown key (the nearest known one is named), a value of the wrong type, a file that
            cannot be read, a relation between fields that ``config`` refuses, or a missing model or data folder that
            the preset needs.
        SystemExit: with status 0 after ``--help``.
    """
    given = list(_split_options(argv))
    chosen = [value for key, value in given if key == "preset"]
    preset = chosen[-1] if chosen else preset_default
    values = _read_yaml(_preset_path(preset)) if preset != PLAIN_DEFAULTS else {}
    configured: dict[str, Any] = {}
    for key, value in given:
        if key == "config":
            configured |= _read_yaml(Path(value))
    values |= configured
    if ("help", "") in given:
        _print_help(values, preset)
    values |= _read_command_line(given)
    values |= {key: value for key, value in (stand_ins or {}).items() if values.get(key) is None}
    _require_recipe(values, preset, is_chosen=bool(chosen) or configured.keys() == _known_keys().keys())
    return _build(values)


def available_presets() -> list[str]:
    """Names that ``--preset`` takes besides ``none``."""
    return sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))


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


def _split_options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
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
        if key not in ("preset", "config") and key not in _known_keys():
            _require_known(typed, _COMMAND_LINE, prefix="--")
        if not has_value:
            is_last = not tokens or tokens[0].startswith("--")
            if is_last and _known_keys().get(key) is not bool:
                raise SettingsError(f"{_COMMAND_LINE}: --{key} has no value, write --{key} VALUE")
            value = "true" if is_last else tokens.pop(0)
        yield key, value


def _read_command_line(given: Iterable[tuple[str, str]]) -> dict[str, Any]:
    parser, values = _options_parser(), {}
    for key, text in given:
        if key not in _known_keys():
            continue
        with_type = _known_keys()[key]
        if get_origin(with_type) is tuple and not text.startswith("["):
            text = f"[{text}]"
        try:
            found = _usable(parser.parse_args([f"--{key}={text}"], defaults=False)[key], with_type)
            values[key] = _as_records(found, with_type)
        except (ArgumentError, TypeError):
            raise SettingsError(f"{_COMMAND_LINE}: --{key} is {text!r}, needed {_spell(with_type)}") from None
    return values


def _preset_path(name: str) -> Path:
    names = [*available_presets(), PLAIN_DEFAULTS]
    if name not in names:
        raise SettingsError(f"unknown preset {name!r}{_nearest(name, names)} (choose from {', '.join(names)})")
    return PRESETS_DIR / f"{name}.yaml"


def _read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file by dotted key, with their types checked."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"config file {path} cannot be read: {_one_line(error)}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"config file {path} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(tree, dict | None):
        raise SettingsError(f"config file {path} holds {type(tree).__name__}, needed a mapping of settings")
    parser, values = _options_parser(), {}
    for key, value in _flatten(tree or {}, str(path)):
        with_type = _known_keys()[key]
        try:
            _check_records(key, value, with_type, str(path))
            found = _usable(parser.parse_object({key: value}, defaults=False)[key], with_type)
            values[key] = _as_records(found, with_type)
        except (ArgumentError, TypeError):
            raise SettingsError(f"{path}: {key} is {value!r}, needed {_spell(with_type)}") from None
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
        if key in _groups() and isinstance(value, Mapping):
            yield from _flatten(value, source, f"{key}.")
        else:
            _require_known(key, source)
            yield key, value


def _require_known(key: str, source: str, *, prefix: str = "") -> None:
    known = list(_known_keys())
    if key in _groups():
        example = next(name for name in known if name.startswith(f"{key}."))
        raise SettingsError(f"{source}: {prefix}{key} is a group of settings, such as {prefix}{example}")
    if key not in known:
        near = _nearest(key, [*known, "preset", "config"] if prefix else known, prefix=prefix)
        raise SettingsError(f"{source}: unknown setting {prefix}{key}{near} (--help lists all)")


def _nearest(name: str, known: Sequence[str], *, prefix: str = "") -> str:
    """``, did you mean ...?`` or nothing. The last part of a key counts first, in whatever group it stands.

    Megatron-LM's own spelling, ``tensor-model-parallel-size``, is found too.
    """
    name = name.replace("-", "_")
    leaf_of = {key: key.rpartition(".")[2] for key in known}
    near_leaves = difflib.get_close_matches(name.rpartition(".")[2], set(leaf_of.values()), n=1, cutoff=0.75)
    candidates = [key for key in known if leaf_of[key] in near_leaves]
    close = difflib.get_close_matches(name, candidates or known, n=1, cutoff=0.0 if candidates else 0.6)
    return f", did you mean {prefix}{close[0]}?" if close else ""


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
    for group, cls in _groups().items():
        inside = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{group}.")}
        try:
            arguments[group] = cls(**inside)
        except ValueError as error:
            where = "" if str(error).startswith(group) else f"{group}: "
            raise SettingsError(f"{where}{_one_line(error)}") from None
    try:
        return TrainSettings(**arguments)
    except ValueError as error:
        raise SettingsError(_one_line(error)) from None


@cache
def _groups() -> dict[str, type]:
    """The nested dataclasses of ``TrainSettings`` by field name."""
    return {name: hint for name, hint in get_type_hints(TrainSettings).items() if is_dataclass(hint)}


@cache
def _known_keys() -> dict[str, Any]:
    """Type of every setting by dotted key, in the order of the dataclasses."""
    hints = {name: hint for name, hint in get_type_hints(TrainSettings).items() if name not in _groups()}
    for group, cls in _groups().items():
        types = get_type_hints(cls)
        hints |= {f"{group}.{field.name}": types[field.name] for field in fields(cls)}
    return hints


def _new_options_parser() -> ArgumentParser:
    """One jsonargparse option per setting, documented from the dataclasses' docstrings."""
    parser = ArgumentParser(prog="pretrain_cocoa.sh", exit_on_error=False, usage="%(prog)s [--key value ...]")
    documented = {"": (TrainSettings, parser)}
    for group, cls in _groups().items():
        summary = (cls.__doc__ or "").partition("\n")[0]
        documented[group] = (cls, parser.add_argument_group(group, summary))
    for key, hint in _known_keys().items():
        group, _, name = key.rpartition(".")
        cls, target = documented[group]
        default = {field.name: field.default for field in fields(cls)}[name]
        target.add_argument(f"--{key}", type=hint, default=default, help=_field_help(cls).get(name, ""))
    return parser


_options_parser = cache(_new_options_parser)


def _print_help(values: Mapping[str, Any], preset: str) -> NoReturn:
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


def _usable(value: Any, hint: Any) -> Any:
    """``value``, unless it is one that jsonargparse lets pass and that no setting means.

    None where ``hint`` has none; an empty text, as a shell variable that is not set leaves it; a number without end.
    """
    if value is None and NoneType not in get_args(hint):
        raise TypeError("null")
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if item == "" or (isinstance(item, float) and not math.isfinite(item)):
            raise TypeError(f"{item!r}")
    return value


def _spell(hint: Any) -> str:
    """A field's type for a reader of an error message."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_spell(member) for member in get_args(hint))
    if get_origin(hint) is tuple:
        record = get_args(hint)[0]
        if is_dataclass(record):
            return f"a list of records with the keys {', '.join(field.name for field in fields(record))}"
        return "a list of names" if record is str else "a list of numbers"
    if get_origin(hint) is dict:
        return "a mapping of names to names"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}[hint]


def _check_records(key: str, value: Any, hint: Any, source: str) -> None:
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
                raise SettingsError(f"{where}: unknown setting {name}{_nearest(str(name), list(types))}")
            try:
                _usable(_record_parser(record).parse_object({name: found}, defaults=False)[name], types[name])
            except (ArgumentError, TypeError):
                raise SettingsError(f"{where}.{name} is {found!r}, needed {_spell(types[name])}") from None
        missing = [name for name in needed if name not in entry]
        if missing:
            raise SettingsError(f"{where} has no {' and no '.join(missing)}: each record needs {' and '.join(needed)}")


@cache
def _record_parser(record: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    for name, hint in get_type_hints(record).items():
        parser.add_argument(f"--{name}", type=hint)
    return parser


def _as_records(value: Any, hint: Any) -> Any:
    """A list of records as instances of their dataclass, with its defaults; any other value as it is."""
    record = get_args(hint)[0] if get_origin(hint) is tuple else None
    if not is_dataclass(record):
        return value
    return tuple(item if is_dataclass(item) else record(**item.as_dict()) for item in value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
