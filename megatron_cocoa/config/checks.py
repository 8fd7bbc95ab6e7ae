"""Checks that settings share: one line to refuse a value, and the nearest values that would do."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_ratio(name: str, value: float) -> None:
    """Refuse a value outside of (0, 1] by its field's name."""
    require(0.0 < value <= 1.0, f"{name} is {value}: a ratio must lie in (0, 1]")


def nearest_multiples(number: int, factor: int) -> str:
    """For a message: the positive multiples of ``factor`` just below and above ``number``, which is not a multiple."""
    below = number // factor * factor
    return f"{below} or {below + factor}" if below > 0 else str(factor)


def nearest_divisors(number: int, size: int) -> str:
    """For a message: the divisors of ``number`` just below and above ``size``, which is smaller and no divisor."""
    below = next(n for n in range(size, 0, -1) if number % n == 0)
    return f"{below} or {next(n for n in range(size, number + 1) if number % n == 0)}"
