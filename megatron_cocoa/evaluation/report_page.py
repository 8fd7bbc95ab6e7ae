"""The frame of every page that this project writes: head, menu, sections."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_cocoa.evaluation import markup
from megatron_cocoa.evaluation.markup import text
from megatron_cocoa.evaluation.report_style import STYLE

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, sections: Sequence[tuple[str, str, Sequence[str]]]) -> str:
    """One HTML document without scripts or external files.

    Args:
        title: of the page, text.
        sections: anchor, title and HTML parts of each.
    """
    menu = "".join(f'<li><a href="#{anchor}">{text(name)}</a></li>' for anchor, name, _ in sections)
    body = "\n".join(markup.section(anchor, name, *parts) for anchor, name, parts in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{text(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header class="page"><h1>{text(title)}</h1></header>\n'
        f'<nav aria-label="Sections"><ul>{menu}</ul></nav>\n<main>\n{body}\n</main>\n</body>\n</html>\n'
    )
