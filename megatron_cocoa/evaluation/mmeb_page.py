"""An evaluation as one self-contained HTML page: scores beside baselines, examples, a map of vectors, settings."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_cocoa.data.decode import read_picture
from megatron_cocoa.evaluation import markup
from megatron_cocoa.evaluation.embedding_map import EmbeddingMap
from megatron_cocoa.evaluation.markup import text
from megatron_cocoa.evaluation.metrics import wilson_interval
from megatron_cocoa.evaluation.mmeb_data import EvalItem, picture_file
from megatron_cocoa.evaluation.mmeb_files import EVIDENCE_SUFFIX
from megatron_cocoa.evaluation.mmeb_summary import BASELINES, GROUPS, Summary
from megatron_cocoa.evaluation.mmeb_tasks import META_TASKS, SPLITS
from megatron_cocoa.evaluation.pictures import thumbnail_png
from megatron_cocoa.evaluation.report_curves import curves_section
from megatron_cocoa.evaluation.report_data import StageCurve, StripCandidate
from megatron_cocoa.evaluation.report_page import page
from megatron_cocoa.evaluation.report_pictures import map_section, query_with_candidates
from megatron_cocoa.evaluation.svg import DotRow, Mark, dot_chart

_METHOD = (
    "Precision@1 in percent with Wilson's 95% interval: the share of queries whose nearest candidate is the right one, "
    "the first of equal ones counting as nearest. 'Ties lost' counts a query that ties as wrong. Chance is a candidate "
    "at random, majority the best constant answer, text only and picture only the same model with the other part of "
    "the query taken away (a dash where the query has no other part)."
)
_NO_RUN = "The model lies in no run's output folder, and --run-path named none."
_HEADER = ("Task", "precision@1", "Ties lost", "Tied rows", "Chance", "Majority", "Text only", "Picture only", "Rows")


def render_page(
    summary: Summary, *, output: str | Path, image_root: str | Path, curves: Sequence[StageCurve] = ()
) -> str:
    """The page (text; write it as UTF-8).

    Args:
        summary: of the score files.
        output: folder that also holds each task's evidence.
        image_root: where the pictures are.
        curves: losses of the run that trained the model.
    """
    evidence = {name: _evidence(Path(output), name) for name in summary.scores}
    examples = _Examples(Path(image_root))
    sections = [
        ("summary", "Summary", _summary(summary)),
        ("scores", "Scores beside baselines", _scores(summary)),
        ("examples", "Hits and misses", _strips(examples, evidence, ("hits", "misses"))),
        ("worst", "Worst queries", _strips(examples, evidence, ("worst",))),
        ("map", "Embedding map", map_section(_maps(evidence))),
        ("losses", "Losses of its training", curves_section(curves, otherwise=_NO_RUN)),
        ("settings", "Settings and versions", _settings(summary)),
        ("credits", "Credits", _credits(summary)),
    ]
    return page(f"{summary.benchmark.name}: {_model_name(summary)}", sections)


def _model_name(summary: Summary) -> str:
    return next(iter(summary.scores.values())).get("model", {}).get("name", "an unnamed model")


def _evidence(output: Path, task: str) -> dict[str, Any] | None:
    file = output / f"{task}{EVIDENCE_SUFFIX}"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _summary(summary: Summary) -> list[str]:
    tiles = []
    for group in GROUPS:
        value, chance = summary.mean(group), summary.mean(group, "chance")
        if value is not None:
            beside = "" if chance is None else f", chance {100 * chance:.1f}"
            name = group.upper() if group in SPLITS else group
            tiles.append(f'<div class="tile"><b>{100 * value:.1f}</b><span>{name}{beside}</span></div>')
    parts = [f'<div class="tiles">{"".join(tiles)}</div>'] if tiles else []
    if summary.missing:
        left_out = f"Missing tasks ({len(summary.missing)}): {', '.join(summary.missing)}. "
        parts.append(markup.missing(left_out + "Means over groups that lack a task are not given."))
    parts += [markup.missing(f"Warning: {sentence}") for sentence in summary.warnings]
    return [*parts, markup.note("Unweighted means over tasks, in percent.")]


def _scores(summary: Summary) -> list[str]:
    parts = [markup.note(_METHOD)]
    for meta in META_TASKS:
        members = [task for task in summary.members(meta) if task.name in summary.scores]
        if members:
            rows = [_row(f"{task.name} ({task.split.upper()})", summary.scores[task.name]) for task in members]
            parts += [markup.table(meta, _HEADER, rows), _chart(summary, meta)]
    return parts


def _row(name: str, score: dict[str, Any]) -> list[str]:
    interval = wilson_interval(score["num_correct"], score["num_pred"])
    told = f"{100 * score['acc']:.1f}<small>{100 * interval.low:.1f}\u2013{100 * interval.high:.1f}</small>"
    baselines = [_percent(score.get("baselines", {}).get(key)) for key in BASELINES]
    ties = str(score.get("num_ties", "-"))
    return [text(name), told, _percent(score.get("acc_ties_as_wrong")), ties, *baselines, str(score["num_pred"])]


def _chart(summary: Summary, meta: str) -> str:
    names = ("model", "majority or chance", "best blind")
    rows = []
    for task in summary.members(meta):
        score = summary.scores.get(task.name)
        if score is None:
            continue
        known = score.get("baselines", {})
        interval = wilson_interval(score["num_correct"], score["num_pred"])
        marks = [Mark(0, 100 * score["acc"], 100 * interval.low, 100 * interval.high)]
        for series, keys in ((1, BASELINES[:2]), (2, BASELINES[2:])):
            values = [known[key] for key in keys if known.get(key) is not None]
            marks += [Mark(series, 100 * max(values))] if values else []
        rows.append(DotRow(task.name, tuple(marks)))
    return dot_chart(rows, title=f"{meta}: model and baselines", unit="percent of queries", series=names)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


class _Examples:
    """Draws queries with their candidates; pictures are read and shrunk once."""

    def __init__(self, image_root: Path) -> None:
        self.root = image_root
        self._thumbnails: dict[str, bytes | None] = {}

    def draw(self, example: dict[str, Any]) -> str:
        """A query, its nearest candidates, and the right one at the end where it is not among them."""
        shown = [
            StripCandidate(c["cosine"], c["right"], text=_words(c["item"]), png=self._png(c["item"]))
            for c in example["candidates"]
        ]
        return query_with_candidates(
            shown,
            query_text=_words(example["query"]),
            query_png=self._png(example["query"]),
            rank=example["rank"],
            num_candidates=example["num_candidates"],
            wanted="" if any(c.right for c in shown) else self._wanted(example["gold"]),
        )

    def _wanted(self, gold: list[str]) -> str:
        png = self._png(gold)
        image = markup.picture(png, "the right answer", css="wanted") if png else ""
        return f'{image}<bdi dir="auto">{text(_words(gold))}</bdi>'

    def _png(self, item: list[str]) -> bytes | None:
        path = item[1]
        if not path:
            return None
        if path not in self._thumbnails:
            file = picture_file(self.root, path)
            self._thumbnails[path] = thumbnail_png(read_picture(file)) if file.is_file() else None
        return self._thumbnails[path]


def _words(item: list[str]) -> str:
    words = EvalItem(*item).words
    return words if len(words) <= 160 else words[:157] + "..."


def _strips(examples: _Examples, evidence: dict[str, dict[str, Any] | None], kinds: tuple[str, ...]) -> list[str]:
    parts = [markup.note("Best first, with the cosine to the query. A frame and the word 'right' mark the right one.")]
    for task, found in evidence.items():
        drawn = [examples.draw(example) for kind in kinds for example in (found or {}).get(kind, ())]
        if drawn:
            state = " open" if len(parts) == 1 else ""
            parts.append(f"<details{state}><summary>{text(task)}</summary>{''.join(drawn)}</details>")
    return parts if len(parts) > 1 else [markup.missing("No examples were recorded.")]


def _maps(evidence: dict[str, dict[str, Any] | None]) -> dict[str, EmbeddingMap]:
    return {task: EmbeddingMap(**found["map"]) for task, found in evidence.items() if found}


def _settings(summary: Summary) -> list[str]:
    score = next(iter(summary.scores.values()))
    parts = []
    for title, key in (("Settings", "settings"), ("Model", "model"), ("Versions", "versions")):
        entries = {name: str(value) for name, value in score.get(key, {}).items()}
        parts.append(f"<h3>{title}</h3>")
        parts.append(markup.definitions(entries) if entries else markup.missing(f"{title}: not in the score files."))
    seconds = math.fsum(s.get("run", {}).get("seconds", 0.0) for s in summary.scores.values())
    return [*parts, markup.note(f"Embedding and scoring took {seconds:.0f} seconds over all tasks.")]


def _credits(summary: Summary) -> list[str]:
    if not summary.benchmark.credits:
        return [markup.missing("The benchmark names no credits; its pictures belong to their owners.")]
    return [f"<ul>{''.join(f'<li>{text(line)}</li>' for line in summary.benchmark.credits)}</ul>"]
