"""From score files alone to the table: by task, meta-task, in and out of distribution, and overall.

Averages are unweighted means over tasks, as published. An average over fewer tasks than the benchmark has is another
number: it is given as null with the missing tasks named, and stands apart under ``partial``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cocoa.evaluation.mmeb_files import SCORE_SUFFIX, TABLE_KEYS, read_score
from megatron_cocoa.evaluation.mmeb_tasks import META_TASKS, MMEB_V1, SPLITS, Benchmark, Task

GROUPS = ("overall", *SPLITS, *META_TASKS)
BASELINES = ("chance", "majority", "query_text_only", "query_image_only")
MANY_TIES = 0.01
"""Share of a task's queries from which on ties are pointed out: float32 cosines tie by accident far more rarely."""


@dataclass(frozen=True)
class Summary:
    """The score files of one folder.

    benchmark: whose tasks they are.
    scores:    content of each score file, by task; tasks without one are absent.
    """

    benchmark: Benchmark
    scores: dict[str, dict[str, Any]]

    def members(self, group: str) -> tuple[Task, ...]:
        """The benchmark's tasks in one of ``GROUPS``."""
        return tuple(t for t in self.benchmark.tasks if group in ("overall", t.split, t.meta_task))

    @property
    def missing(self) -> list[str]:
        """Tasks without a score, in the benchmark's order."""
        return [task.name for task in self.benchmark.tasks if task.name not in self.scores]

    @property
    def warnings(self) -> list[str]:
        """A sentence for each task whose score hangs on the order of tied candidates."""
        return [sentence for task, score in self.scores.items() if (sentence := tie_warning(task, score))]

    @property
    def has_meaningless(self) -> bool:
        """Whether all queries of some task tie."""
        return any(score.get("num_ties", 0) == score["num_pred"] for score in self.scores.values())

    def mean(self, group: str, key: str = "acc") -> float | None:
        """Unweighted mean over all tasks of a group; None where one is missing, or lacks the key."""
        values = [self._value(task.name, key) for task in self.members(group)]
        return None if not values or None in values else sum(values) / len(values)

    def partial(self, group: str) -> dict[str, Any]:
        """The mean over those tasks that are there, with their number."""
        values = [self.scores[t.name]["acc"] for t in self.members(group) if t.name in self.scores]
        of = len(self.members(group))
        return {"acc": sum(values) / len(values) if values else None, "num_tasks": len(values), "of": of}

    def _value(self, task: str, key: str) -> float | None:
        score = self.scores.get(task, {})
        return score.get(key) if key in score else score.get("baselines", {}).get(key)

    def to_json(self) -> dict[str, Any]:
        """The table as JSON values; scores are shares in [0, 1], as ``acc`` is."""
        content: dict[str, Any] = {group: self.mean(group) for group in GROUPS}
        content["tasks"] = {t.name: self._value(t.name, "acc") for t in self.benchmark.tasks}
        content["missing"] = self.missing
        if self.missing:
            content["partial"] = {group: self.partial(group) for group in GROUPS}
        content["ties_as_wrong"] = {group: self.mean(group, "acc_ties_as_wrong") for group in GROUPS}
        content["baselines"] = {name: {group: self.mean(group, name) for group in GROUPS} for name in BASELINES}
        content["details"] = {name: _details(score) for name, score in self.scores.items()}
        content["warnings"] = self.warnings
        content["benchmark"] = self.benchmark.name
        return content


def summarize(output: str | Path) -> Summary:
    """Read the score files of a folder.

    Raises:
        ValueError: if there is none, one is damaged or of no known task, or two were made with different settings,
            models or benchmarks: they make no table together.
    """
    folder = Path(output)
    files = sorted(folder.glob(f"*{SCORE_SUFFIX}"))
    if not files:
        raise ValueError(f"{folder} has no *{SCORE_SUFFIX}: evaluate into it first")
    scores = {file.name.removesuffix(SCORE_SUFFIX): read_score(file) for file in files}
    first, content = next(iter(scores.items()))
    for name, other in scores.items():
        for key in TABLE_KEYS:
            if other.get(key) != content.get(key):
                raise ValueError(
                    f"{folder}: the scores of {first} and {name} were made with another {key} "
                    f"({_shortly(content.get(key), other.get(key))}): evaluate both alike"
                )
    table = content.get("benchmark")
    benchmark = MMEB_V1 if table is None else Benchmark.from_json(table, origin=str(files[0]))
    benchmark.select(scores)
    return Summary(benchmark, {task.name: scores[task.name] for task in benchmark.tasks if task.name in scores})


def _shortly(first: Any, second: Any) -> str:
    if isinstance(first, dict) and isinstance(second, dict):
        names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
        return ", ".join(f"{name}: {first.get(name)!r} and {second.get(name)!r}" for name in names[:3])
    return f"{first!r} and {second!r}"


def _details(score: dict[str, Any]) -> dict[str, Any]:
    names = ("acc", "num_correct", "num_pred", "acc_ties_as_wrong", "acc_expected", "num_ties", "num_cut", "baselines")
    return {name: score[name] for name in names if name in score}


def tie_warning(task: str, score: dict[str, Any]) -> str | None:
    """A sentence if ties matter to a score, else None."""
    ties, total = score.get("num_ties", 0), score["num_pred"]
    if ties == total:
        return (
            f"{task}: ALL {total} queries tie for their best candidate. Its acc {100 * score['acc']:.1f} is the order "
            f"of the list and says nothing of the model (ties lost: {100 * score['acc_ties_as_wrong']:.1f}, at random: "
            f"{100 * score['acc_expected']:.1f}); does the model give every input the same vector?"
        )
    if ties >= MANY_TIES * total and ties:
        return (
            f"{task}: {ties} of {total} queries tie for their best candidate: acc {100 * score['acc']:.1f} takes "
            f"the first, {100 * score['acc_ties_as_wrong']:.1f} if ties are lost, "
            f"{100 * score['acc_expected']:.1f} at random"
        )
    return None


def render_summary(summary: Summary) -> str:
    """The table for a terminal, in percent, baselines beside the scores, at most 110 columns."""
    header = f"{'':<26}{'acc':>7}{'ties':>6}{'strict':>8}{'chance':>8}{'major.':>8}{'text':>7}{'image':>7}{'rows':>7}"
    lines = [f"{summary.benchmark.name}: precision@1 in percent", "", header]
    for meta in META_TASKS:
        members = summary.members(meta)
        if not members:
            continue
        lines.append(meta)
        lines += [_task_line(task, summary.scores.get(task.name)) for task in members]
    lines += ["", "unweighted means"]
    for group in GROUPS:
        if summary.members(group):
            lines.append(_group_line(summary, group))
    lines += ["", "strict: ties lost; text, image: the model sees only that part of the query (-: it has no other)."]
    if summary.missing:
        lines.append(f"missing ({len(summary.missing)}): {', '.join(summary.missing)}")
    return "\n".join([*lines, *(f"WARNING: {sentence}" for sentence in summary.warnings)])


def _task_line(task: Task, score: dict[str, Any] | None) -> str:
    name = f"  {task.name} ({task.split.upper()})"
    if score is None:
        return f"{name:<26}{'missing':>7}"
    cells = (score["acc"], score.get("acc_ties_as_wrong"), *(score.get("baselines", {}).get(n) for n in BASELINES))
    acc, strict, chance, majority, text, image = map(_percent, cells)
    ties = score.get("num_ties", "-")
    return f"{name:<26}{acc:>7}{ties:>6}{strict:>8}{chance:>8}{majority:>8}{text:>7}{image:>7}{score['num_pred']:>7}"


def _group_line(summary: Summary, group: str) -> str:
    found = summary.partial(group)
    name = f"  {group.upper() if group in SPLITS else group}"
    if found["num_tasks"] < found["of"]:
        partial = f"; those present: {_percent(found['acc'])}" if found["num_tasks"] else ""
        return f"{name:<26}{'null':>7}  {found['num_tasks']} of {found['of']} tasks{partial}"
    keys = ("acc", "acc_ties_as_wrong", *BASELINES)
    acc, strict, chance, majority, text, image = (_percent(summary.mean(group, key)) for key in keys)
    return f"{name:<26}{acc:>7}{'':>6}{strict:>8}{chance:>8}{majority:>8}{text:>7}{image:>7}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
