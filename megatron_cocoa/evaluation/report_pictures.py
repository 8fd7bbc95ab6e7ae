"""The report's pictures: what the image decoder filled in, and what retrieval found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_cocoa.evaluation.embedding_map import MAP_NOTE, EmbeddingMap
from megatron_cocoa.evaluation.markup import missing, note, picture, text
from megatron_cocoa.evaluation.report_data import (
    DIRECTION_NAMES,
    POOL_NAMES,
    Reconstruction,
    RetrievalStrip,
    StripCandidate,
)
from megatron_cocoa.evaluation.scatter import scatter_chart


def reconstruction_section(items: Sequence[Reconstruction]) -> list[str]:
    """Masked, reconstructed and original picture of each item, side by side, as HTML parts."""
    if not items:
        return [missing("No pictures were reconstructed: the run had no stage warmup, or evaluate was off.")]
    explained = "The image decoder sees the masked picture and its caption; units that were not masked are copied."
    return [note(explained), f'<div class="pictures">{"".join(_trio(item) for item in items)}</div>']


def strip_section(strips: Sequence[RetrievalStrip]) -> list[str]:
    """Each query with its nearest candidates, grouped by pool and direction, as HTML parts."""
    if not strips:
        return [missing("No retrieval examples were recorded.")]
    groups: dict[tuple[str, str], list[RetrievalStrip]] = {}
    for strip in strips:
        groups.setdefault((strip.pool, strip.direction), []).append(strip)
    parts = [note("Best first, with the cosine to the query. A frame and the word 'right' mark right answers.")]
    for (pool, direction), members in groups.items():
        parts.append(f"<h3>{POOL_NAMES[pool]}, {DIRECTION_NAMES[direction]}</h3>")
        parts += [_strip(strip) for strip in members]
    return parts


def map_section(maps: Mapping[str, EmbeddingMap]) -> list[str]:
    """A chart of each map, under its title, as HTML parts."""
    if not maps:
        return [missing("No vectors were recorded.")]
    charts = [
        scatter_chart(
            {"queries": found.queries, "right answers": found.targets}, title=f"{title} ({100 * found.explained:.0f}%)"
        )
        for title, found in maps.items()
    ]
    return [note(MAP_NOTE), f'<div class="maps">{"".join(charts)}</div>']


def _trio(item: Reconstruction) -> str:
    cells = []
    for name, png in (("masked", item.masked), ("reconstructed", item.reconstructed), ("original", item.original)):
        image = picture(png, f"{name}: {item.caption}")
        cells.append(f"<figure>{image}<figcaption>{name}</figcaption></figure>")
    error = "" if item.mae is None else f'<div class="note">squared error per value: {item.mae:.3f}</div>'
    caption = f'<bdi dir="auto">{text(item.caption)}</bdi>'
    return f'<div><div class="trio">{"".join(cells)}</div><div>{caption}</div>{error}</div>'


def _strip(strip: RetrievalStrip) -> str:
    return query_with_candidates(
        strip.candidates,
        query_text=strip.query_text,
        query_png=strip.query_png,
        rank=strip.rank,
        num_candidates=strip.num_candidates,
    )


def query_with_candidates(
    candidates: Sequence[StripCandidate],
    *,
    query_text: str,
    query_png: bytes | None,
    rank: float,
    num_candidates: int,
    wanted: str = "",
) -> str:
    """A query and its nearest candidates, best first, as HTML.

    ``rank`` is the right answer's, from 1; ``wanted`` is HTML that shows it, where it is not among the candidates.
    """
    query = []
    if query_png is not None:
        query.append(picture(query_png, f"query picture {query_text}".strip()))
    if query_text:
        query.append(f'<p><bdi dir="auto">{text(query_text)}</bdi></p>')
    found = "" if any(c.right for c in candidates) else "not shown; "
    query.append(note(f"right answer: {found}rank {rank:g} of {num_candidates}"))
    shown = "".join(_candidate(candidate) for candidate in candidates)
    below = f'<p class="note">right would be: {wanted}</p>' if wanted else ""
    return f'<div class="strip"><div class="query">{"".join(query)}</div><div><ol>{shown}</ol>{below}</div></div>'


def _candidate(candidate: StripCandidate) -> str:
    mark = " (right)" if candidate.right else ""
    image = "" if candidate.png is None else picture(candidate.png, f"{candidate.text or 'candidate'}{mark}")
    badge = '<span class="badge">\u2713 right</span>' if candidate.right else ""
    css = ' class="right"' if candidate.right else ""
    return (
        f'<li{css}>{image}{badge}<bdi dir="auto">{text(candidate.text)}</bdi>'
        f'<span class="cosine">{candidate.cosine:.3f}</span></li>'
    )
