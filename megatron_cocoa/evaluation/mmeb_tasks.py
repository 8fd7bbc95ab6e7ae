"""Which tasks a benchmark has, in which of the four meta-tasks, and which are in distribution.

MMEB-V1's table (arXiv 2410.05160) is data here. A data folder may bring its own table in ``benchmark.json``, as the
mini benchmark does; a folder without one is MMEB-V1's.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

META_TASKS = ("classification", "vqa", "retrieval", "grounding")
SPLITS = ("ind", "ood")
BENCHMARK_FILE = "benchmark.json"


@dataclass(frozen=True)
class Task:
    """One task: ``meta_task`` of ``META_TASKS``, ``split`` ``ind`` (its training part was trained on) or ``ood``."""

    name: str
    meta_task: str
    split: str

    def __post_init__(self) -> None:
        if self.meta_task not in META_TASKS or self.split not in SPLITS:
            raise ValueError(
                f"task {self.name!r} has meta-task {self.meta_task!r} and split {self.split!r}: needed one of "
                f"{', '.join(META_TASKS)}, and one of {', '.join(SPLITS)}"
            )
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"{self.name!r} cannot name a task: it also names a folder and files")


@dataclass(frozen=True)
class Benchmark:
    """A named list of tasks, in the order in which tables show them; ``credits`` name the works that pages show."""

    name: str
    tasks: tuple[Task, ...]
    credits: tuple[str, ...] = ()

    def select(self, names: Iterable[str] | None) -> tuple[Task, ...]:
        """The tasks of these names in the benchmark's order; all for None.

        Raises:
            ValueError: for a name that the benchmark does not have, with the nearest that it has.
        """
        if names is None:
            return self.tasks
        wanted, known = set(names), [task.name for task in self.tasks]
        unknown = sorted(wanted - set(known))
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}" if near else ""
            raise ValueError(f"{self.name} has no task {', '.join(unknown)}{hint}? It has: {', '.join(known)}")
        return tuple(task for task in self.tasks if task.name in wanted)

    def to_json(self) -> dict[str, Any]:
        """As in ``benchmark.json`` and in score files."""
        rows = {task.name: {"meta_task": task.meta_task, "split": task.split} for task in self.tasks}
        return {"name": self.name, "tasks": rows} | ({"credits": list(self.credits)} if self.credits else {})

    @classmethod
    def from_json(cls, content: Any, *, origin: str) -> Benchmark:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: naming ``origin``, if something is missing.
        """
        try:
            rows = content["tasks"].items()
            tasks = tuple(Task(name, row["meta_task"], row["split"]) for name, row in rows)
            name, credits = content["name"], tuple(map(str, content.get("credits", ())))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{origin} is not a table of tasks ({type(error).__name__}: {error}): needed "
                '{"name": .., "tasks": {NAME: {"meta_task": .., "split": ..}}}'
            ) from error
        if not tasks or not isinstance(name, str):
            raise ValueError(f"{origin} has {len(tasks)} tasks under the name {name!r}: needed both")
        return cls(name, tasks, credits)


def read_benchmark(data_path: str | Path) -> Benchmark:
    """The table of a data folder: its ``benchmark.json``, or MMEB-V1's where there is none.

    Raises:
        ValueError: if the folder is missing, or its table cannot be read.
    """
    folder = Path(data_path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: needed one with a folder per task, as MMEB-eval is laid out")
    file = folder / BENCHMARK_FILE
    if not file.is_file():
        return MMEB_V1
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from error
    return Benchmark.from_json(content, origin=str(file))


_MMEB_V1 = {
    ("classification", "ind"): "ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
    ("classification", "ood"): "Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    ("vqa", "ind"): "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W",
    ("vqa", "ood"): "ScienceQA VizWiz GQA TextVQA",
    ("retrieval", "ind"): "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
    ("retrieval", "ood"): "FashionIQ Wiki-SS-NQ OVEN EDIS",
    ("grounding", "ind"): "MSCOCO",
    ("grounding", "ood"): "RefCOCO RefCOCO-Matching Visual7W-Pointing",
}

MMEB_V1 = Benchmark(
    "MMEB-V1", tuple(Task(name, *place) for place, names in _MMEB_V1.items() for name in names.split())
)
