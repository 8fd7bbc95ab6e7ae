"""The HTML report: self-contained, escaped, accessible, complete, and honest about what is missing."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from megatron_cocoa.evaluation.embedding_map import EmbeddingMap, principal_axes
from megatron_cocoa.evaluation.metrics import evaluate_pairs
from megatron_cocoa.evaluation.pictures import encode_png
from megatron_cocoa.evaluation.report import render_report
from megatron_cocoa.evaluation.report_data import (
    TWEMOJI_CREDIT,
    BridgeEvidence,
    Credit,
    RecallRow,
    Reconstruction,
    ReportData,
    RetrievalStrip,
    StageCurve,
    StripCandidate,
)

HOSTILE = "<script>alert('x')</script> & \"quoted\""
PNG = encode_png(np.full((4, 4, 3), 128, dtype=np.uint8))


def recall_rows(pairs: int = 30) -> tuple[RecallRow, ...]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(pairs, pairs, generator=generator)
    models = (
        ("untrained", "untrained", 0.0),
        (f"after {HOSTILE}", "stage", 4.0),
        ("contrastive only", "baseline", 2.0),
    )
    return tuple(
        RecallRow(model, pool, direction, result, kind)
        for pool in ("heldout", "training")
        for model, kind, strength in models
        for direction, result in evaluate_pairs(
            strength * torch.eye(pairs) + noise, torch.eye(pairs), keys=range(pairs)
        ).items()
    )


def full_report() -> ReportData:
    candidates = (StripCandidate(0.9, False, HOSTILE, PNG), StripCandidate(0.8, True, "key", PNG))
    return ReportData(
        title=HOSTILE,
        ran={HOSTILE: HOSTILE},
        settings={"seed": "1234"},
        resolved=HOSTILE,
        recall=recall_rows(),
        curves=(
            StageCurve("warmup", (1, 2, 3), {"mntp": (3.0, float("nan"), 1.0), HOSTILE: (1.0, 1.0, 1.0)}, seconds=2.0),
            StageCurve("bridge", (5,), {"mntp": (2.0,)}),
            StageCurve("contrastive", (1, 2), {"contrastive": (float("nan"), float("inf"))}),
        ),
        bridge=(BridgeEvidence(HOSTILE, (1.0, 2.0), (3.0, 4.0), (1, 2)),),
        reconstructions=(Reconstruction(HOSTILE, PNG, PNG, PNG, mae=0.25),),
        strips=(
            RetrievalStrip("heldout", "text_to_image", candidates, 2.0, 30, query_text=HOSTILE),
            RetrievalStrip("heldout", "image_to_text", candidates[:1], 17.0, 30, query_png=PNG, kind="miss"),
            RetrievalStrip("heldout", "text_to_image", candidates[:1], 29.0, 30, query_text="last", kind="worst"),
        ),
        maps={HOSTILE: EmbeddingMap([[0.0, 1.0]], [[1.0, 0.5]], 0.75)},
        credits=(TWEMOJI_CREDIT, Credit("x", "y", "z", url="javascript:alert(1)")),
        environment={"torch": "2.13.0"},
        notes=(HOSTILE,),
    )


class Page(HTMLParser):
    """Collects tags and attributes, and fails on a tag that is closed out of order."""

    VOID = {"meta", "img", "br", "!doctype"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"


def test_nothing_is_loaded_or_run():
    """Claim: one file, no script, no resource but embedded pictures, and a policy that holds a browser to it."""
    page = Page(render_report(full_report()))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        assert attrs.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        assert re.match(r"#|https?://", attrs.get("href", "#"))
    assert any("default-src 'none'" in (attrs.get("content") or "") for _, attrs in page.tags)
    assert "url(" not in render_report(full_report()) and "@import" not in render_report(full_report())


def test_text_is_escaped_everywhere():
    """Claim: text from data, settings and captions never becomes markup, in elements, attributes or charts."""
    html = render_report(full_report())
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "javascript:" not in html
    assert render_report(ReportData(title="\udcff")).encode("utf-8")


def test_pictures_charts_and_tables_are_described():
    """Claim: each image has an alt text, each chart a title and a role, each table a caption and scoped headers."""
    html = render_report(full_report())
    page = Page(html)
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    charts = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(charts) == 2 + 1 + 3 + 1
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert root.get("role") == "img" and root.get("aria-label")
        assert root.find("title").text
        assert not re.search(r"nan|inf", " ".join(e.get("d", "") for e in root.iter()))
    tables = re.findall(r"<table>.*?</table>", html, flags=re.DOTALL)
    assert len(tables) == 4 + 1
    for table in tables:
        assert table.startswith("<table><caption>") and 'scope="col"' in table and 'scope="row"' in table


def test_dark_and_light_define_the_same_colours():
    """Claim: no colour of the light scheme is left over in the dark one."""
    html = render_report(ReportData(title="x"))
    light, dark = (re.findall(r"(--[\w-]+):", block) for block in re.findall(r":root \{(.*?)\}", html, flags=re.DOTALL))
    assert light == dark and "prefers-color-scheme: dark" in html


def test_results_are_shown_as_measured():
    """Claim: recall with its interval, the bridge's difference and the rank of a missed answer stand on the page."""
    data = full_report()
    html = render_report(data)
    estimate = data.recall[2].result.recall[10]
    assert f"{100 * estimate.value:.1f}<small>{100 * estimate.low:.1f}\u2013{100 * estimate.high:.1f}</small>" in html
    assert "+1.333" in html  # (3 + 4 - 1 - 2) nats over 3 tokens
    assert "right answer: rank 2 of 30" in html and "right answer: not shown; rank 17 of 30" in html
    assert html.count("\u2713 right") == 1
    misses, worst = (html.index(f'id="{anchor}"') for anchor in ("examples", "worst"))
    assert misses < html.index("rank 17 of 30") < worst < html.index("rank 29 of 30"), "each under its own heading"
    assert "(75%)" in html and html.count('<circle class="mark s0"') > 0
    assert "1 non-finite left out" in html and "none of 2 recorded values is finite" in html
    assert "CC-BY 4.0" in html


def test_missing_parts_are_named():
    """Claim: an empty run renders, and says of each part that it is not there."""
    html = render_report(ReportData(title="empty"))
    Page(html)
    for sentence in (
        "Nothing was measured",
        "No retrieval was measured",
        "Block B&#x27;s loss was not measured",
        "No losses were recorded",
        "No pictures were reconstructed",
        "No retrieval examples",
        "No vectors were recorded",
        "Environment: none recorded",
        "No credits were given",
    ):
        assert sentence in html
    rows = [row for row in recall_rows() if row.kind == "stage"]
    partial = render_report(replace(full_report(), recall=tuple(rows)))
    assert "No baseline was trained" in partial and "The untrained model was not measured" in partial
    assert "No baseline was trained" not in render_report(full_report())


def test_wrong_inputs_are_refused():
    """Claim: what would draw a wrong or broken page is an error with numbers."""
    with pytest.raises(ValueError, match="is not a PNG file: it starts with b'GIF89a'"):
        render_report(ReportData(title="x", reconstructions=(Reconstruction("c", b"GIF89a", PNG, PNG),)))
    with pytest.raises(ValueError, match="2 values for 3 steps"):
        StageCurve("warmup", (1, 2, 3), {"mntp": (1.0, 2.0)})
    with pytest.raises(ValueError, match="do not ascend"):
        StageCurve("warmup", (1, 1), {"mntp": (1.0, 2.0)})
    with pytest.raises(ValueError, match=r"found \(1, 2, 2\)"):
        BridgeEvidence("x", (1.0,), (1.0, 2.0), (1, 1))
    mixed = (recall_rows(30)[0], recall_rows(20)[0])
    with pytest.raises(ValueError, match="measure all models on one pool"):
        render_report(ReportData(title="x", recall=mixed))


def test_bridge_gain_and_interval_equal_their_definition():
    """Claim: the gain is a ratio of sums, its interval 1.96 standard errors of the ratio over samples."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, size=50)
    own, other = rng.gamma(2.0, size=50) * tokens, rng.gamma(3.0, size=50) * tokens
    evidence = BridgeEvidence("x", tuple(own), tuple(other), tuple(tokens.tolist()))
    ratio = (other - own).sum() / tokens.sum()
    error = np.sqrt(np.var(other - own - ratio * tokens, ddof=1) * 50) / tokens.sum()
    # Both in float64.
    assert evidence.gain == pytest.approx((ratio, ratio - 1.959964 * error, ratio + 1.959964 * error), rel=1e-6)
    assert evidence.share_better == np.mean(own < other)
    assert np.isnan(BridgeEvidence("x", (1.0,), (2.0,), (1,)).gain[1])
    assert BridgeEvidence("x", (1.0, 1.0, 2.0, 3.0), (2.0, 1.0, 1.0, 3.0), (1,) * 4).share_better == (1 + 0.5 + 0.5) / 4


def test_the_map_is_a_projection_on_the_axes_of_most_variance():
    """Claim: distances on the map are those in the plane of the covariance's two largest eigenvectors."""
    rng = np.random.default_rng(0)
    queries, targets = (rng.normal(size=(20, 6)) * (5, 1, 3, 1, 1, 1) for _ in range(2))
    found = principal_axes(queries, targets)
    values, vectors = np.linalg.eigh(np.cov(np.concatenate([queries, targets]).T))
    plane = np.concatenate([queries, targets]) @ vectors[:, -2:]
    drawn = np.array(found.queries + found.targets)
    distances = [np.linalg.norm(points[:, None] - points[None], axis=-1) for points in (plane, drawn)]
    # Coordinates are rounded to four digits.
    np.testing.assert_allclose(*distances, atol=3e-4)
    assert found.explained == pytest.approx(values[-2:].sum() / values.sum(), abs=1e-4)


def test_block_b_is_told_apart_by_what_is_left_of_it():
    """Claim: sums run over the samples of a bin alone, by a plain count; bins without a masked token are left out."""
    evidence = BridgeEvidence("x", (1.0, 2.0, 6.0), (3.0, 3.0, 7.0), (1, 2, 2), num_visible=(0, 3, 4))
    assert [(b.label, b.own, b.other, b.num_tokens) for b in evidence.by_visible] == [
        ("0", 1.0, 3.0, 1),
        ("3 to 4", 2.0, 2.5, 4),
    ]
    assert BridgeEvidence("x", (1.0,), (2.0,), (1,)).by_visible == []
    with pytest.raises(ValueError, match="1 counts of visible tokens for 2 samples"):
        BridgeEvidence("x", (1.0, 1.0), (1.0, 1.0), (1, 1), num_visible=(1,))
