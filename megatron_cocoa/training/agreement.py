"""Whether all ranks hold the same number, found from sums over ranks: no exchange beyond one that a step has anyway.

n numbers are equal if and only if n times the sum of their squares is the square of their sum (Cauchy-Schwarz).
"""

from __future__ import annotations

from collections.abc import Sequence


def powers(digest: int) -> list[int]:
    """The three 21-bit parts of a 63-bit ``digest``, then their squares: six numbers to be summed over ranks in int64.

    Parts of 21 bits, so that the squares of up to 2**21 ranks sum to less than 2**63.
    """
    parts = [digest >> shift & (1 << 21) - 1 for shift in (0, 21, 42)]
    return [*parts, *(part * part for part in parts)]


def all_equal(sums: Sequence[int], num_ranks: int) -> bool:
    """Whether all ranks had the same digest, given the sums of ``powers`` over ``num_ranks`` ranks."""
    return all(num_ranks * squares == total * total for total, squares in zip(sums[:3], sums[3:]))
