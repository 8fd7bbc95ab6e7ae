"""Gradient norms that stand out from those before them, as broken samples and failing hardware bring them about.

Clipping bounds what such a step does to the weights, but not its direction, nor what it leaves in Adam's moments.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

NUM_NORMS, LEAST_NORMS = 100, 20
"""How many norms of applied steps are remembered, and how many it takes to judge another by them."""


def highest_norm(recent: Sequence[float], ratio: float | None) -> float:
    """Up to which norm a step is applied: ``ratio`` times the median of ``recent``; infinity where that says little.

    Args:
        recent: norms of applied steps, as ``remember`` keeps them.
        ratio: ``optimizer.max_norm_ratio``.
    """
    if ratio is None or len(recent) < LEAST_NORMS:
        return math.inf
    return ratio * statistics.median(recent)


def remember(recent: list[float], norm: float) -> None:
    """Add the norm of an applied step, and forget the oldest. Norms of skipped steps would raise what is allowed."""
    recent.append(norm)
    del recent[:-NUM_NORMS]
