"""Refusing a value at construction, in one line."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_ratio(name: str, value: float) -> None:
    """Refuse a value outside of (0, 1] by its field's name."""
    require(0.0 < value <= 1.0, f"{name} is {value}: a ratio must lie in (0, 1]")


def nearest_multiples(number: int, factor: int) -> str:
    """The positive multiples of ``factor`` just below and above a ``number`` that is none, for a message."""
    below = number // factor * factor
    return f"{below} or {below + factor}" if below > 0 else str(factor)


def nearest_divisors(number: int, size: int) -> str:
    """The divisors of ``number`` just below and above a ``size`` below it that is none, for a message."""
    below = next(n for n in range(size, 0, -1) if number % n == 0)
    return f"{below} or {next(n for n in range(size, number + 1) if number % n == 0)}"
