"""Refusing a value at construction, in one line."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_ratio(name: str, value: float) -> None:
    """Refuse a value outside of (0, 1] by its field's name."""
    require(0.0 < value <= 1.0, f"{name} is {value}: a ratio must lie in (0, 1]")
