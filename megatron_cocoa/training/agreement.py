"""Whether all ranks hold the same number, told by sums over them: free where a step sums something anyway."""

from __future__ import annotations

from collections.abc import Sequence


def powers(digest: int) -> list[int]:
    """Three parts of 63 bits and their squares: their sums over ranks tell whether all ranks have the same bits.

    21 bits each, since squares must sum to less than 2**63.
    """
    parts = [digest >> shift & (1 << 21) - 1 for shift in (0, 21, 42)]
    return [*parts, *(part * part for part in parts)]


def all_equal(sums: Sequence[int], num_ranks: int) -> bool:
    """From the sums of ``powers``: n times the sum of squares is the square of the sum for n equal numbers only."""
    return all(num_ranks * squares == total * total for total, squares in zip(sums[:3], sums[3:]))
