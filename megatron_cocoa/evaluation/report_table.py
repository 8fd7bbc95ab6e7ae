"""Recall as a plain-text table for the terminal: the same rows, in the same order, as the report's tables."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from megatron_cocoa.evaluation.metrics import Estimate
from megatron_cocoa.evaluation.report_data import DIRECTION_NAMES, POOL_NAMES, RecallRow

METHOD_NOTE = (
    "Recall in percent with Wilson's 95% interval (queries taken as independent); 'x chance' is recall@{k} over that "
    "of a random order. Ties count at their expected value under random order, so that equal embeddings score chance."
)

TERMINAL_WIDTH = 100

NOTABLE_TIES = 0.005
"""Recalls that change by more than this with the treatment of ties are reported one by one."""


def group_rows(rows: Sequence[RecallRow]) -> list[list[RecallRow]]:
    """Rows by pool and direction, groups in the order in which they first appear.

    Raises:
        ValueError: if rows of one group were measured on different pools or depths: they cannot stand in one
            table beside one chance level.
    """
    groups: dict[tuple[str, str], list[RecallRow]] = {}
    for row in rows:
        groups.setdefault((row.pool, row.direction), []).append(row)
    for (pool, direction), members in groups.items():
        shapes = {(r.result.num_queries, r.result.num_candidates, tuple(r.result.recall)) for r in members}
        if len(shapes) > 1:
            raise ValueError(
                f"rows of {POOL_NAMES[pool]}, {DIRECTION_NAMES[direction]}, differ in (queries, candidates, "
                f"depths): {sorted(shapes)}; measure all models on one pool"
            )
    return list(groups.values())


def times_chance(row: RecallRow, k: int) -> float:
    """Recall@k over the recall@k of a random order."""
    return row.result.recall[k].value / row.result.chance[k]


def times(ratio: float) -> str:
    """A multiple of chance, without decimals where they would be noise."""
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.1f}"


def tie_notes(rows: Sequence[RecallRow]) -> list[str]:
    """What ties do to the rows: a sentence for each whose recall depends on them, one for all others together."""
    notes, harmless = [], [row.result.num_tied_queries for row in rows if not _ties_matter(row)]
    for row in rows:
        result, k = row.result, max(row.result.recall)
        if _ties_matter(row):
            notes.append(
                f"Ties: {row.model}, {POOL_NAMES[row.pool].lower()}, {DIRECTION_NAMES[row.direction]}: "
                f"{result.num_tied_queries} of {result.num_queries} queries; recall@{k} is "
                f"{100 * result.recall_argmax[k]:.1f} if the first of equals wins, "
                f"{100 * result.recall_pessimistic[k]:.1f} if every tie is lost."
            )
    if any(harmless):
        notes.append(
            f"Ties {'elsewhere ' if notes else ''}touch at most {max(harmless)} queries of a row, and change no "
            f"recall by more than {100 * NOTABLE_TIES:g} points however they are broken."
        )
    return notes


def _ties_matter(row: RecallRow) -> bool:
    result = row.result
    others = (result.recall_argmax, result.recall_pessimistic)
    return any(abs(other[k] - result.recall[k].value) > NOTABLE_TIES for other in others for k in result.recall)


def render_table(rows: Sequence[RecallRow]) -> str:
    """Tables of recall by pool and direction, chance first; at most 110 columns for model names up to 30.

    Args:
        rows: see ``RecallRow``; may be empty.

    Raises:
        ValueError: as in ``group_rows``.
    """
    if not rows:
        return "No retrieval was measured (evaluate is off, or the data folder has no eval_*.jsonl)."
    width = max(len("chance"), *(len(row.model) for row in rows))
    lines: list[str] = []
    for group in group_rows(rows):
        lines += [*_group_lines(group, width), ""]
    if all(row.kind != "baseline" for row in rows):
        lines.append("No baseline was trained (--with-baseline adds contrastive learning alone).")
    sentences = [METHOD_NOTE.format(k=max(rows[0].result.recall)), *tie_notes(rows)]
    lines += [line for sentence in sentences for line in textwrap.wrap(sentence, TERMINAL_WIDTH)]
    return "\n".join(lines)


def _group_lines(group: Sequence[RecallRow], width: int) -> Iterator[str]:
    first = group[0].result
    depths = tuple(first.recall)
    deepest = max(depths)
    yield (
        f"{POOL_NAMES[group[0].pool]}, {DIRECTION_NAMES[group[0].direction]} "
        f"({first.num_queries} queries among {first.num_candidates})"
    )
    header = "".join(f"  {f'recall@{k}':<19}" for k in depths)
    yield f"  {'':<{width}}{header}  {'x chance':>8}"
    chance = "".join(f"  {100 * first.chance[k]:5.1f}{'':<14}" for k in depths)
    yield f"  {'chance':<{width}}{chance}  {1:8.1f}"
    for row in group:
        cells = "".join(f"  {_cell(row.result.recall[k])}" for k in depths)
        yield f"  {row.model:<{width}}{cells}  {times(times_chance(row, deepest)):>8}"


def _cell(estimate: Estimate) -> str:
    return f"{100 * estimate.value:5.1f} [{100 * estimate.low:5.1f},{100 * estimate.high:5.1f}]"
