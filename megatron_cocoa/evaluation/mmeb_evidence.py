"""What a page needs to show of a task beyond its score, small enough to keep: examples, and a map of vectors."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_cocoa.evaluation.embedding_map import principal_axes
from megatron_cocoa.evaluation.mmeb_data import TaskData
from megatron_cocoa.evaluation.mmeb_scores import TaskScore, unit_rows

NUM_EXAMPLES = 3
DEPTH = 5


def task_evidence(task: TaskData, vectors: np.ndarray, score: TaskScore) -> dict[str, Any]:
    """Hits, misses and worst queries with their nearest candidates, and queries and answers on two principal axes.

    Args:
        task: rows.
        vectors: float ``(things, hidden)``, those of ``task.items`` first.
        score: of the task.

    Returns:
        JSON values: ``hits``, ``misses`` and ``worst`` (queries with candidates, cosines and the right one's rank),
        and ``map`` with ``queries`` and ``targets``, two coordinates each, and the share of variance they show.
    """
    answered = score.ranks == 1
    worst = np.argsort(-score.ranks, kind="stable")[:NUM_EXAMPLES]
    worst = worst[score.ranks[worst] > 1]
    misses = np.setdiff1d(_spread(np.flatnonzero(~answered)), worst)
    unit = unit_rows(vectors, "things to embed")
    answers = np.array([offered[0] for offered in task.candidates])

    def examples(rows: np.ndarray) -> list[dict[str, Any]]:
        return [_example(task, unit, score, int(row)) for row in rows]

    return {
        "hits": examples(_spread(np.flatnonzero(answered))),
        "misses": examples(misses),
        "worst": examples(worst),
        "map": asdict(principal_axes(unit[task.queries], unit[answers])),
    }


def _spread(rows: np.ndarray) -> np.ndarray:
    """A few rows, evenly over those there are."""
    if len(rows) <= NUM_EXAMPLES:
        return rows
    return rows[np.linspace(0, len(rows) - 1, NUM_EXAMPLES + 2).astype(int)[1:-1]]


def _example(task: TaskData, unit: np.ndarray, score: TaskScore, row: int) -> dict[str, Any]:
    offered = task.candidates[row]
    # One thing may stand in a list twice: the page shows it once.
    things = offered[np.sort(np.unique(offered, return_index=True)[1])]
    cosines = unit[things] @ unit[task.queries[row]]
    best = np.argsort(-cosines, kind="stable")[:DEPTH]
    return {
        "query": list(task.items[task.queries[row]]),
        "gold": list(task.items[offered[0]]),
        "rank": int(score.ranks[row]),
        "num_candidates": len(things),
        "candidates": [
            {
                "item": list(task.items[things[place]]),
                "cosine": round(float(cosines[place]), 4),
                "right": bool(things[place] == offered[0]),
            }
            for place in best
        ],
    }
