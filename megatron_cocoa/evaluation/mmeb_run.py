"""The evaluation itself: tasks one after the other, each finished on disk before the next begins."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_cocoa.evaluation.mmeb_data import EvalItem, TaskData, picture_bytes, pictures_sha256, read_task
from megatron_cocoa.evaluation.mmeb_encode import Encode, Encoded
from megatron_cocoa.evaluation.mmeb_evidence import task_evidence
from megatron_cocoa.evaluation.mmeb_files import Identity, check_others, is_scored, write_task
from megatron_cocoa.evaluation.mmeb_scores import TaskScore, chance_accuracy, majority_accuracy, score_task, unit_rows
from megatron_cocoa.evaluation.mmeb_summary import tie_warning
from megatron_cocoa.evaluation.mmeb_tasks import Task
from megatron_cocoa.parallel import topology
from megatron_cocoa.parallel.collectives import on_first_rank

Say = Callable[[str], None]


@dataclass
class VectorStore:
    """Vectors of things, each embedded once, kept while a task that is still to come needs them.

    Args:
        encode: see ``Encode``.
        uses: how many of the tasks at hand have the thing.
    """

    encode: Encode
    uses: Counter[EvalItem]
    _kept: dict[EvalItem, tuple[np.ndarray, bool]] = field(default_factory=dict)

    def vectors(self, items: Sequence[EvalItem]) -> Encoded:
        """The things' vectors, embedded now or before; every rank calls it."""
        fresh = [item for item in items if item not in self._kept]
        encoded = self.encode(fresh) if fresh else None
        new = {} if encoded is None else dict(zip(fresh, zip(encoded.vectors, encoded.cut.tolist())))
        found = [new[item] if item in new else self._kept[item] for item in items]
        for item in items:
            self.uses[item] -= 1
            if self.uses[item] <= 0:
                self._kept.pop(item, None)
            elif item in new:
                vector, cut = new[item]
                # A copy: the row is a view that would keep the vectors of the whole task.
                self._kept[item] = vector.copy(), cut
        return Encoded(np.stack([vector for vector, _ in found]), np.array([cut for _, cut in found], dtype=bool))


def evaluate(
    tasks: Sequence[Task],
    *,
    data_path: str | Path,
    image_root: str | Path,
    output: str | Path,
    encode: Encode,
    identity: Identity,
    versions: dict[str, Any],
    computation: dict[str, Any] | None = None,
    with_baselines: bool = False,
    overwrite: bool = False,
    say: Say = print,
) -> None:
    """Score tasks that have no valid score file yet; every rank calls it.

    All files are read and all pictures looked for before the first vector is computed.

    Args:
        tasks: in order.
        data_path, image_root: see ``read_task`` and ``picture_file``.
        output: folder for score files.
        encode: things to vectors.
        identity: what scores depend on; a score file of the same identity is kept.
        versions: recorded, not compared.
        computation: likewise, under ``run``: what moves vectors by rounding alone, such as the batch size.
        with_baselines: also embed queries without their picture, and without their text.
        overwrite: score again what was scored under something else.
        say: takes progress on the first rank.

    Raises:
        ValueError: for data that cannot be read, pictures that are missing, score files of another identity, or
            vectors that are not finite. Finished tasks stay.
    """
    output = Path(output)
    on_first_rank(lambda: check_others(output, [task.name for task in tasks], identity))
    data = [read_task(data_path, task) for task in tasks]
    # It looks at every picture's file, while the others wait.
    pictures = on_first_rank(lambda: _pictures_sha256(data, image_root), is_long=True)
    wanted = {
        task.task.name: identity.of_task({"sha256": task.sha256, "pictures_sha256": pictures[task.task.name]})
        for task in data
    }
    pending = on_first_rank(lambda: _pending(wanted, output, overwrite=overwrite))
    for task in data:
        if task.task.name not in pending:
            say(f"{task.task.name}: kept")
    data = [task for task in data if task.task.name in pending]
    store = VectorStore(encode, Counter(item for task in data for item in _needed(task, with_baselines)))
    for task in data:
        started = time.monotonic()
        score, evidence, predictions = _score(task, store, with_baselines)
        score |= wanted[task.task.name] | {"versions": versions}
        seconds = round(time.monotonic() - started, 2)
        score["run"] = {"seconds": seconds, "ranks": _num_ranks()} | (computation or {})
        if topology.is_first_rank():
            write_task(output, task.task.name, score=score, predictions=predictions, evidence=evidence)
        say(f"{task.task.name}: {100 * score['acc']:.1f} ({score['num_correct']} of {score['num_pred']})")
        if warning := tie_warning(task.task.name, score):
            say(f"WARNING: {warning}")


def _needed(task: TaskData, with_baselines: bool) -> list[EvalItem]:
    queries = {item: None for items in _blind(task).values() for item in items if item} if with_baselines else {}
    return list(dict.fromkeys((*task.items, *queries)))


def _blind(task: TaskData) -> dict[str, list[EvalItem | None]]:
    queries = [task.items[i] for i in task.queries]
    return {
        "query_text_only": [query.without_picture() for query in queries],
        "query_image_only": [query.without_text() for query in queries],
    }


def _score(
    task: TaskData, store: VectorStore, with_baselines: bool
) -> tuple[dict[str, Any], dict[str, Any], list[tuple[str, str]]]:
    needed = _needed(task, with_baselines)
    encoded = store.vectors(needed)
    vectors = encoded.vectors
    _check_vectors(vectors, needed, task.task.name)
    position = {item: i for i, item in enumerate(needed)}
    found = score_task(vectors[task.queries], vectors, task.candidates)
    blind = dict.fromkeys(("query_text_only", "query_image_only"))
    for name, queries in _blind(task).items() if with_baselines else ():
        # A task whose queries have one part only has no blind form; one odd query would change what is averaged.
        if all(query is not None for query in queries):
            rows = vectors[[position[query] for query in queries]]
            seen = score_task(rows, vectors, task.candidates)
            # Ties at random: the order of the list must not make a blind model look good.
            blind[name] = seen.expected / seen.num_pred
    sizes = [len(offered) for offered in task.candidates]
    score = _as_json(task.task, found) | {
        "num_items": len(task.items),
        # The task's own things, which come first: not the blind queries, and whichever task embedded them.
        "num_cut": int(encoded.cut[: len(task.items)].sum()),
        "num_candidates": {"min": min(sizes), "mean": sum(sizes) / len(sizes), "max": max(sizes)},
        "baselines": {
            "chance": chance_accuracy(task.candidates),
            "majority": majority_accuracy(task.candidates),
            **blind,
        },
    }
    predictions = [tuple(task.items[offered[p]]) for offered, p in zip(task.candidates, found.predictions)]
    return score, task_evidence(task, vectors, found), predictions


def _as_json(task: Task, found: TaskScore) -> dict[str, Any]:
    return {
        "acc": found.acc,
        "num_correct": found.num_correct,
        "num_pred": found.num_pred,
        "acc_ties_as_wrong": found.num_strict / found.num_pred,
        "acc_expected": found.expected / found.num_pred,
        "num_ties": found.num_ties,
        "all_tied": found.all_tied,
        "task": task.name,
        "meta_task": task.meta_task,
        "split": task.split,
    }


def _check_vectors(vectors: np.ndarray, items: Sequence[EvalItem], task: str) -> None:
    try:
        unit_rows(vectors, "things to embed")
    except ValueError as error:
        bad = int(np.argmin(np.isfinite(vectors).all(axis=1) & (np.abs(vectors).max(axis=1) > 0)))
        raise ValueError(f"task {task}: {error}; that is {tuple(items[bad])!r}") from error


def _pending(wanted: dict[str, dict[str, Any]], output: Path, *, overwrite: bool) -> list[str]:
    return [name for name, parts in wanted.items() if not is_scored(output, name, parts, overwrite=overwrite)]


def _pictures_sha256(data: Sequence[TaskData], image_root: str | Path) -> dict[str, str]:
    """Of each task, by its name.

    Raises:
        ValueError: naming the first task that has pictures which are missing.
    """
    sizes = picture_bytes((item for task in data for item in task.items), image_root)
    for task in data:
        missing = [path for path in dict.fromkeys(i.image_path for i in task.items) if path and sizes[path] is None]
        if missing:
            raise ValueError(
                f"task {task.task.name}: {len(missing)} pictures are not below {image_root} (first: {missing[0]!r}): "
                f"unpack the benchmark's images there; no row is left out"
            )
    return {task.task.name: pictures_sha256(task.items, sizes) for task in data}


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
