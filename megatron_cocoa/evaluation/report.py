"""One self-contained HTML page that shows what a run did and whether it learned.

No script, no external file: the page opens from disk, mails as one attachment and reads the same in ten years. A
content security policy in the page holds it to that. Parts that a run did not produce are named as missing, so
that an empty space is never taken for a result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_cocoa.evaluation import markup
from megatron_cocoa.evaluation.markup import text
from megatron_cocoa.evaluation.metrics import Estimate
from megatron_cocoa.evaluation.report_curves import curves_section
from megatron_cocoa.evaluation.report_data import (
    DIRECTION_NAMES,
    POOL_NAMES,
    BridgeEvidence,
    Credit,
    RecallRow,
    ReportData,
)
from megatron_cocoa.evaluation.report_page import page
from megatron_cocoa.evaluation.report_pictures import map_section, reconstruction_section, strip_section
from megatron_cocoa.evaluation.report_table import (
    METHOD_NOTE,
    group_rows,
    tie_notes,
    times,
    times_chance,
)
from megatron_cocoa.evaluation.svg import DotRow, Mark, dot_chart

_NOTHING_MEASURED = "No retrieval was measured: evaluate was off, or the data folder has no eval_*.jsonl."


def render_report(data: ReportData) -> str:
    """The report as one HTML document (text; write it as UTF-8).

    Args:
        data: what to show; every part may be empty.

    Raises:
        ValueError: if rows of one table were measured on different pools, or a picture is not a PNG file.
    """
    sections = (
        ("summary", "Summary", _summary(data)),
        ("retrieval", "Retrieval", _retrieval(data.recall)),
        ("bridge", "What the bridge carries", _bridge(data.bridge)),
        ("losses", "Losses by stage", curves_section(data.curves)),
        ("reconstructions", "Masked, reconstructed, original", reconstruction_section(data.reconstructions)),
        ("examples", "Hits and misses", strip_section([s for s in data.strips if s.kind != "worst"])),
        ("worst", "Worst queries", strip_section([s for s in data.strips if s.kind == "worst"])),
        ("map", "Embedding map", map_section(data.maps)),
        ("environment", "Settings and environment", _environment(data)),
        ("credits", "Credits", _credits(data.credits)),
    )
    return page(data.title, sections)


def _summary(data: ReportData) -> list[str]:
    tiles = "".join(
        f'<div class="tile"><b>{text(value)}</b><span>{text(label)}</span></div>' for value, label in _headline(data)
    )
    parts = [f'<div class="tiles">{tiles}</div>' if tiles else markup.missing("Nothing was measured in this run.")]
    if data.ran:
        parts.append(markup.definitions(data.ran))
    return parts + [markup.note(sentence) for sentence in data.notes]


def _headline(data: ReportData) -> list[tuple[str, str]]:
    """Value and explanation of the few numbers that say whether the run learned."""
    tiles = []
    for group in group_rows(data.recall):
        last = next((row for row in reversed(group) if row.kind == "stage"), None)
        if last is None or last.direction != "text_to_image":
            continue
        k = _shown_depth(last)
        estimate, pool = last.result.recall[k], POOL_NAMES[last.pool].lower()
        tiles.append(
            (
                f"{100 * estimate.value:.1f}%",
                f"recall@{k}, text to image, {pool}, {last.model}: {times(times_chance(last, k))} times chance "
                f"(95% interval {100 * estimate.low:.1f} to {100 * estimate.high:.1f})",
            )
        )
    if data.bridge:
        last_evidence = data.bridge[-1]
        gain, low, high = last_evidence.gain
        interval = f" (95% interval {low:+.2f} to {high:+.2f})" if math.isfinite(low) else ""
        told = f"extra cost of a block B token when A is another sample's, {last_evidence.model}{interval}"
        tiles.append((f"{gain:+.2f} nats", told))
    return tiles


def _shown_depth(row: RecallRow) -> int:
    """Training concepts are judged by their first place, held-out ones by the deepest list measured."""
    depths = row.result.recall
    return min(depths) if row.pool == "training" else max(depths)


def _retrieval(rows: Sequence[RecallRow]) -> list[str]:
    if not rows:
        return [markup.missing(_NOTHING_MEASURED)]
    groups = group_rows(rows)
    tables = "".join(_recall_table(group) for group in groups)
    charts = "".join(_recall_chart([row for row in rows if row.pool == pool]) for pool in POOL_NAMES)
    parts = [f'<div class="panels">{charts}</div>', f'<div class="tables">{tables}</div>']
    if all(row.kind != "untrained" for row in rows):
        parts.append(markup.missing("The untrained model was not measured."))
    if all(row.kind != "baseline" for row in rows):
        parts.append(markup.missing("No baseline was trained (--with-baseline adds contrastive learning alone)."))
    deepest = max(rows[0].result.recall)
    parts.append(markup.note(METHOD_NOTE.format(k=deepest) + " Items that share a caption are right for each other."))
    return parts + [markup.note(sentence) for sentence in tie_notes(rows)]


def _recall_table(group: Sequence[RecallRow]) -> str:
    first = group[0].result
    depths, deepest = tuple(first.recall), max(first.recall)
    last_stage = max((i for i, row in enumerate(group) if row.kind == "stage"), default=None)
    rows = [["chance", *(f"{100 * first.chance[k]:.1f}" for k in depths), "1.0", ""]]
    css = ["reference"]
    for index, row in enumerate(group):
        cells = [_percent(row.result.recall[k]) for k in depths]
        rows.append([text(row.model), *cells, times(times_chance(row, deepest)), f"{row.result.median_rank:.0f}"])
        css.append("last" if index == last_stage else "")
    caption = (
        f"{POOL_NAMES[group[0].pool]}, {DIRECTION_NAMES[group[0].direction]} "
        f"({first.num_queries} queries among {first.num_candidates})"
    )
    header = ["Model", *(f"Recall@{k}" for k in depths), "x chance", "Median rank"]
    return markup.table(caption, header, rows, row_css=css)


def _recall_chart(rows: Sequence[RecallRow]) -> str:
    if not rows:
        return ""
    k = _shown_depth(rows[0])
    directions = [d for d in DIRECTION_NAMES if any(row.direction == d for row in rows)]
    by_model: dict[str, list[Mark]] = {}
    for row in rows:
        estimate = row.result.recall[k]
        ends = (100 * end for end in (estimate.value, estimate.low, estimate.high))
        by_model.setdefault(row.model, []).append(Mark(directions.index(row.direction), *ends))
    return dot_chart(
        [DotRow(model, tuple(marks)) for model, marks in by_model.items()],
        title=f"{POOL_NAMES[rows[0].pool]}: recall@{k}",
        unit="percent of queries",
        series=[DIRECTION_NAMES[d] for d in directions],
        references={"chance": 100 * rows[0].result.chance[k]},
    )


def _percent(estimate: Estimate) -> str:
    interval = f"{100 * estimate.low:.1f}\u2013{100 * estimate.high:.1f}"
    return f"{100 * estimate.value:.1f}<small>{interval}</small>"


def _bridge(evidence: Sequence[BridgeEvidence]) -> list[str]:
    if not evidence:
        return [markup.missing("Block B's loss was not measured: the run had no stage bridge, or evaluate was off.")]
    rows = []
    for item in evidence:
        gain, low, high = item.gain
        interval = f"<small>{low:+.3f} to {high:+.3f}</small>" if math.isfinite(low) else ""
        rows.append(
            [
                text(item.model),
                f"{item.own:.3f}",
                f"{item.other:.3f}",
                f"{gain:+.3f}{interval}",
                f"{100 * item.share_better:.0f}%",
                f"{len(item.num_tokens)} ({sum(item.num_tokens)})",
            ]
        )
    header = ["Model", "Own A", "Another's A", "Difference", "Own is lower", "Samples (tokens)"]
    chart = dot_chart(
        [DotRow(item.model, (Mark(0, item.own), Mark(1, item.other))) for item in evidence],
        title="Loss of block B",
        unit="nats per masked token",
        series=["own A", "another sample's A"],
        from_zero=False,
    )
    intro = (
        "Block B sees block A only through the bridge. If the bridge carries what A shows, B's masked tokens cost "
        "more when A belongs to another sample; without a difference, it carries nothing of A that helps."
    )
    caption = "Block B's loss in nats per masked token"
    return [
        f"<p>{text(intro)}</p>",
        f'<div class="panels">{chart}{markup.table(caption, header, rows)}</div>',
        markup.note("The difference has a 95% interval over samples, normal approximation of a ratio of sums."),
        *_by_visible(evidence),
    ]


def _by_visible(evidence: Sequence[BridgeEvidence]) -> list[str]:
    """Tables of block B's loss against the number of B tokens that are not masked, where that is known."""
    header = ["Visible B tokens", "Own A", "Another's A", "Difference", "Masked tokens"]
    tables = []
    for item in evidence:
        rows = [
            [text(b.label), f"{b.own:.3f}", f"{b.other:.3f}", f"{b.other - b.own:+.3f}", f"{b.num_tokens}"]
            for b in item.by_visible
        ]
        if rows:
            tables.append(markup.table(f"{item.model}: by what is left of B", header, rows))
    return [f'<div class="panels">{"".join(tables)}</div>'] if tables else []


def _environment(data: ReportData) -> list[str]:
    parts = []
    for title, entries in (("Settings", data.settings), ("Environment", data.environment)):
        parts.append(f"<h3>{title}</h3>")
        parts.append(markup.definitions(entries) if entries else markup.missing(f"{title}: none recorded."))
    if data.resolved:
        parts.append(f"<details><summary>Resolved configuration</summary><pre>{text(data.resolved)}</pre></details>")
    return parts


def _credits(credits: Sequence[Credit]) -> list[str]:
    if not credits:
        return [markup.missing("No credits were given for the pictures and texts on this page.")]
    items = []
    for credit in credits:
        changes = f" Changes: {text(credit.changes)}." if credit.changes else ""
        licence = markup.link(credit.url, credit.licence)
        items.append(f"<li>{text(credit.title)}: {text(credit.holder)}. Licensed under {licence}.{changes}</li>")
    return [f"<ul>{''.join(items)}</ul>"]
