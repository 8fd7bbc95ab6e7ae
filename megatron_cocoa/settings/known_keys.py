"""Which settings there are: the dataclasses of ``megatron_cocoa.config``, by dotted key such as ``warmup.lr``."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from megatron_cocoa.config import TrainSettings
from megatron_cocoa.settings.errors import SettingsError


@cache
def groups() -> dict[str, type]:
    """The nested dataclasses of ``TrainSettings`` by field name."""
    return {name: hint for name, hint in get_type_hints(TrainSettings).items() if is_dataclass(hint)}


@cache
def known_keys() -> dict[str, Any]:
    """Type of every setting by dotted key, in the order of the dataclasses."""
    hints = {name: hint for name, hint in get_type_hints(TrainSettings).items() if name not in groups()}
    for group, cls in groups().items():
        types = get_type_hints(cls)
        hints |= {f"{group}.{field.name}": types[field.name] for field in fields(cls)}
    return hints


def require_known(key: str, source: str, *, prefix: str = "") -> None:
    """Refuse a ``key`` that no setting has; ``source`` and ``prefix`` say where and how it was written."""
    known = list(known_keys())
    if key in groups():
        example = next(name for name in known if name.startswith(f"{key}."))
        raise SettingsError(f"{source}: {prefix}{key} is a group of settings, such as {prefix}{example}")
    if key not in known:
        near = nearest(key, [*known, "preset", "config"] if prefix else known, prefix=prefix)
        raise SettingsError(f"{source}: unknown setting {prefix}{key}{near} (--help lists all)")


def nearest(name: str, known: Sequence[str], *, prefix: str = "") -> str:
    """``, did you mean ...?`` or nothing. The last part of a key counts first, in whatever group it stands.

    Megatron-LM's own spelling, ``tensor-model-parallel-size``, is found too.
    """
    name = name.replace("-", "_")
    leaf_of = {key: key.rpartition(".")[2] for key in known}
    near_leaves = difflib.get_close_matches(name.rpartition(".")[2], set(leaf_of.values()), n=1, cutoff=0.75)
    candidates = [key for key in known if leaf_of[key] in near_leaves]
    close = difflib.get_close_matches(name, candidates or known, n=1, cutoff=0.0 if candidates else 0.6)
    return f", did you mean {prefix}{close[0]}?" if close else ""
