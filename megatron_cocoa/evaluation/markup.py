"""The few pieces of HTML that the report is made of. Everything that enters as text leaves escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def text(value: object) -> str:
    """``value`` as HTML text, safe in element content and in quoted attributes.

    Lone surrogates (undecodable file names) become question marks, as UTF-8 cannot hold them.
    """
    return escape(str(value).encode("utf-8", "replace").decode("utf-8"), quote=True)


def link(url: str, label: str) -> str:
    """An anchor for http(s) addresses; any other scheme (``javascript:``) stays plain text."""
    if url.startswith(("https://", "http://")):
        return f'<a href="{text(url)}" rel="noreferrer">{text(label)}</a>'
    return text(label)


def picture(png: bytes, alt: str, *, css: str = "") -> str:
    """An image embedded as a data URI.

    Raises:
        ValueError: if ``png`` is not a PNG file; a browser would show a broken image without a word.
    """
    if not png.startswith(PNG_SIGNATURE):
        raise ValueError(f"picture {alt!r} is not a PNG file: it starts with {png[:8]!r}, needed {PNG_SIGNATURE!r}")
    data = base64.b64encode(png).decode("ascii")
    name = f' class="{text(css)}"' if css else ""
    return f'<img{name} alt="{text(alt)}" src="data:image/png;base64,{data}">'


def section(anchor: str, title: str, *body: str) -> str:
    """A titled section; ``body`` parts are HTML."""
    content = "\n".join(part for part in body if part)
    return f'<section id="{text(anchor)}" aria-labelledby="h-{text(anchor)}">\n' + (
        f'<h2 id="h-{text(anchor)}">{text(title)}</h2>\n{content}\n</section>'
    )


def missing(sentence: str) -> str:
    """Says that a part is not there, and why."""
    return f'<p class="missing">{text(sentence)}</p>'


def note(sentence: str) -> str:
    """A sentence in small print."""
    return f'<p class="note">{text(sentence)}</p>'


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, row_css: Sequence[str] = ()) -> str:
    """A data table: the first cell of each row heads it, the others are numbers.

    Args:
        caption, header: text.
        rows: cells as HTML.
        row_css: a class for each row, or none at all.
    """
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    body = []
    for index, (first, *others) in enumerate(rows):
        name = f' class="{text(row_css[index])}"' if row_css and row_css[index] else ""
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        body.append(f'<tr{name}><th scope="row">{first}</th>{cells}</tr>')
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}"><table>'
        f"<caption>{text(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def definitions(entries: Mapping[str, str]) -> str:
    """Label and value pairs."""
    rows = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in entries.items())
    return f"<dl>{rows}</dl>"
