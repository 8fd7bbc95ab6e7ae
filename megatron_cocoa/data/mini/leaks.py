"""Proof that what is scored was not trained on: no caption, no name and no picture, nor one that looks the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_cocoa.data.concepts import TWIN_CORRELATION
from megatron_cocoa.data.mini.rows import TaskRows

CHECK_SIDE = 24
TWIN = 0.95


@dataclass(frozen=True)
class LeakReport:
    """What was compared, and the nearest that was found; ``problems`` is empty or the benchmark is not written."""

    num_eval_pictures: int
    num_train_pictures: int
    largest_correlation: float
    num_shared_captions: int
    num_shared_concepts: int
    problems: tuple[str, ...]

    def as_json(self) -> dict:
        """For the manifest."""
        return asdict(self)


def largest_correlation(thumbnails: np.ndarray, others: np.ndarray, *, rows: int = 1024) -> np.ndarray:
    """For each picture its largest Pearson correlation with any of the others.

    Args:
        thumbnails: uint8 ``(pictures, ...)``.
        others: uint8 ``(others, ...)``, of the same size.
        rows: pictures compared at a time.

    Returns:
        float32 ``(pictures,)``; -1 where there is no other. A picture of one flat colour correlates with nothing.
    """
    if not len(others) or not len(thumbnails):
        return np.full(len(thumbnails), -1, dtype=np.float32)
    left, right = _centred(thumbnails), _centred(others)
    parts = [(left[start : start + rows] @ right.T).max(axis=1) for start in range(0, len(left), rows)]
    return np.concatenate(parts)


def keep_unlike(candidates: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Bool ``(candidates,)``: which training pictures are no twin of a held-out one."""
    return largest_correlation(candidates, held) <= TWIN_CORRELATION


def check_leaks(
    root: Path,
    tasks: Sequence[TaskRows],
    *,
    quick_start: np.ndarray,
    concepts: tuple[set[str], set[str]],
    captions: tuple[set[str], set[str]],
) -> LeakReport:
    """Compare everything that is scored with everything that is trained on.

    Pictures of scored rows, at 24 pixels (finer than those that the split was drawn with), against all training
    pictures of this benchmark and of the quick start; base concepts and captions against each other. What tasks share
    by design is no leak and not compared: questions, class names and prompts.

    Args:
        root: of the benchmark.
        tasks: with their rows.
        quick_start: uint8 ``(pictures, side, side, 3)``, the quick start's training pictures.
        concepts, captions: of held-out and of training emojis.
    """
    held = sorted({s.image for t in tasks for row in t.eval_rows for s in (row.query, *row.targets) if s.image})
    trained = sorted({s.image for t in tasks for pair in t.train for s in (pair.query, pair.target) if s.image})
    thumbnails = {path: _load(root / path, CHECK_SIDE) for path in {*held, *trained}}
    scored = np.stack([thumbnails[path] for path in held])
    nearest = largest_correlation(scored, np.stack([thumbnails[path] for path in trained]))
    coarse = np.stack([_load(root / path, quick_start.shape[1]) for path in held])
    nearest = np.maximum(nearest, largest_correlation(coarse, quick_start))
    shared = (captions[0] & captions[1]), (concepts[0] & concepts[1])
    problems = [f"{held[i]} is a twin of a training picture ({nearest[i]:.3f})" for i in np.flatnonzero(nearest > TWIN)]
    problems += [f"{path} is both scored and trained on" for path in sorted(set(held) & set(trained))]
    for kind, found in zip(("caption", "concept"), shared):
        problems += [f"{kind} {value!r} is on both sides" for value in sorted(found)]
    return LeakReport(len(held), len(trained), float(nearest.max()), len(shared[0]), len(shared[1]), tuple(problems))


def thumbnails_of(root: Path, paths: Iterable[str], side: int) -> np.ndarray:
    """uint8 ``(paths, side, side, 3)``."""
    return np.stack([_load(root / path, side) for path in paths])


def _load(path: Path, side: int) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BOX))


def _centred(thumbnails: np.ndarray) -> np.ndarray:
    flat = np.asarray(thumbnails, dtype=np.float32).reshape(len(thumbnails), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
