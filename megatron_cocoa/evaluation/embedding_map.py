"""Where queries and their right answers lie in the space of embeddings, on a plane that can be drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAP_POINTS = 150
"""Of each side: more would hide one another."""

MAP_NOTE = (
    "Queries and their right answers on the two principal axes of both together, in brackets the share of the "
    "variance that these show. Two clouds apart show a gap between query and target side, one point a model that "
    "gives every input the same vector."
)


@dataclass(frozen=True)
class EmbeddingMap:
    """Places of queries and of their right answers.

    queries, targets: two coordinates each, rounded; row ``i`` with row ``i``.
    explained:        share of the variance that the two axes show, in [0, 1].
    """

    queries: list[list[float]]
    targets: list[list[float]]
    explained: float


def principal_axes(queries: np.ndarray, targets: np.ndarray) -> EmbeddingMap:
    """Project both sides on the two principal axes of both together.

    Args:
        queries, targets: float ``(rows, hidden)``, rows of length one, row ``i`` with row ``i``; ``MAP_POINTS`` of
            them at most are shown, evenly over all.
    """
    rows = np.linspace(0, len(queries) - 1, min(MAP_POINTS, len(queries))).astype(int)
    both = np.concatenate([queries[rows], targets[rows]])
    centred = both - both.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    places = (left[:, :2] * sizes[:2]).round(4)
    if places.shape[1] < 2:
        places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    total = float((sizes**2).sum())
    explained = float((sizes[:2] ** 2).sum()) / total if total else 0.0
    return EmbeddingMap(places[: len(rows)].tolist(), places[len(rows) :].tolist(), round(explained, 4))
