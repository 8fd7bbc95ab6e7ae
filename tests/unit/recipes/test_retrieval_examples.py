"""Which queries a training report shows: hits, misses and the worst, each for what it is."""

import torch

from megatron_cocoa.data.rows import CaptionRow
from megatron_cocoa.recipes.retrieval_examples import DEPTH, NUM_EXAMPLES, pool_examples


def pool(number: int, wrong: dict[int, int]):
    """Captions find their own picture, but those of ``wrong``, whose picture is the named number of places behind."""
    rows = [CaptionRow(f"r{i}", f"{i}.png", f"caption {i}") for i in range(number)]
    pictures = torch.eye(number)
    texts = torch.eye(number)
    for item, behind in wrong.items():
        others = [place for place in range(number) if place != item][:behind]
        texts[item] = 0.0
        # Nearest first, the right one last of all that are near.
        texts[item, others] = torch.linspace(1.0, 0.9, behind)
        texts[item, item] = 0.5
    return rows, torch.nn.functional.normalize(texts, dim=-1), pictures


def test_hits_misses_and_worst_are_told_apart():
    """Claim: a strip's kind follows from the rank of its right answer, no query is shown twice, worst first."""
    wrong = {2: 1, 5: 9, 9: 3, 11: 1, 14: 6, 17: 2, 21: 1}
    rows, texts, pictures = pool(30, wrong)
    drawn: list[str] = []

    def thumbnail(row: CaptionRow) -> bytes:
        drawn.append(row.row_id)
        return row.row_id.encode()

    strips = pool_examples(rows, texts, pictures, thumbnail=thumbnail)
    by_text = [strip for strip in strips if strip.direction == "text_to_image"]
    shown = {kind: [s for s in by_text if s.kind == kind] for kind in ("hit", "miss", "worst")}
    assert [strip.query_text for strip in shown["worst"]] == ["caption 5", "caption 14", "caption 9"]
    assert [strip.rank for strip in shown["worst"]] == [10, 7, 4]
    assert len(shown["hit"]) == len(shown["miss"]) == NUM_EXAMPLES
    assert {s.query_text for s in shown["miss"]} <= {f"caption {i}" for i in (2, 11, 17, 21)}
    for strip in shown["hit"]:
        assert strip.rank == 1 and strip.candidates[0].right
        assert strip.candidates[0].png == strip.query_text.replace("caption ", "r").encode()
    for strip in shown["miss"] + shown["worst"]:
        assert strip.rank > 1 and not strip.candidates[0].right
    assert len({s.query_text for s in by_text}) == len(by_text)
    assert all(len(strip.candidates) == DEPTH and strip.num_candidates == 30 for strip in strips)


def test_a_pool_without_misses_shows_none():
    rows, texts, pictures = pool(8, {})
    strips = pool_examples(rows, texts, pictures, thumbnail=lambda row: b"")
    assert {strip.kind for strip in strips} == {"hit"}
    assert {strip.direction for strip in strips} == {"text_to_image", "image_to_text"}


def test_equal_vectors_are_no_hits():
    """Claim: a model that gives every input the same vector has no hit to show: the first of equal ones is chance."""
    rows, texts, pictures = pool(8, {})
    strips = pool_examples(rows, torch.ones(8, 8), torch.ones(8, 8), thumbnail=lambda row: b"")
    assert {strip.kind for strip in strips} == {"miss", "worst"}
