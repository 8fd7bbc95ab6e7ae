"""Relations on windows of sixteen pictures: "the picture to the right of the pizza", the window's cells to choose from.

Asked for "the giraffe" a model could answer without the window. Asked for a neighbour it cannot: the name says which
cell to start from, only the window says what stands beside it. Every cell is the answer equally often.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from megatron_cocoa.data.mini.emoji import Emoji
from megatron_cocoa.data.mini.rows import EvalRow, Pair, PictureFolder, Side, TaskRows, generator, gold_first, picture

SIDE = 4
CELL = 56
_WINDOWS = {"heldout": 200, "train": 500}
_QUESTIONS = {"heldout": 2, "train": 4}
_STEPS = {"to the right of": (0, 1), "to the left of": (0, -1), "below": (1, 0), "above": (-1, 0)}


def grounding_tasks(emojis: Sequence[Emoji], pictures: PictureFolder, root: Path) -> list[TaskRows]:
    """Windows of cells of the sprite sheet, and, never trained on, of the other style."""
    tasks = []
    for name, style, split in (("SpriteRelation", "noto", "ind"), ("SpriteRelation_3d", "fluent", "ood")):
        members = [emoji for emoji in emojis if emoji.style == style]
        held = [e for e in members if e.split == "heldout"]
        asked = _ask(held, name, "heldout", pictures, root)
        rows = [EvalRow(query, gold_first(gold, cells)) for query, gold, cells in asked]
        train: list[Pair] = []
        if split == "ind":
            trained = [e for e in members if e.split == "train"]
            train = [Pair(query, gold) for query, gold, _ in _ask(trained, name, "train", pictures, root)]
        tasks.append(TaskRows(name, "grounding", split, rows, train))
    return tasks


def _ask(
    pool: Sequence[Emoji], task: str, part: str, pictures: PictureFolder, root: Path
) -> list[tuple[Side, Side, list[Side]]]:
    """Query, right cell and all cells, for every question of every window."""
    random = generator(task, part)
    cells = {emoji.path: _cell(root / emoji.path) for emoji in pool}
    found, targets = [], []
    for number in range(_WINDOWS[part]):
        window = _distinct(random.sample(pool, min(len(pool), 4 * SIDE * SIDE)))
        sides = [picture("Represent the given cropped image of the object.", emoji.path) for emoji in window]
        path = pictures.write(f"{task.lower()}-{part}", f"{number:04d}", _compose([cells[e.path] for e in window]))
        for _ in range(_QUESTIONS[part]):
            if not targets:
                targets = random.sample(range(SIDE * SIDE), SIDE * SIDE)
            target = targets.pop()
            relation, anchor = random.choice(_anchors(target))
            asked = f"Select the picture {relation} the {window[anchor].name}."
            found.append((picture(asked, path), sides[target], sides))
    return found


def _distinct(sample: Sequence[Emoji]) -> list[Emoji]:
    """The first sixteen of different concepts."""
    by_concept: dict[str, Emoji] = {}
    for emoji in sample:
        by_concept.setdefault(emoji.concept, emoji)
    window = list(by_concept.values())[: SIDE * SIDE]
    if len(window) < SIDE * SIDE:
        raise ValueError(f"{len(sample)} pictures have {len(window)} concepts, a window needs {SIDE * SIDE}")
    return window


def _anchors(target: int) -> list[tuple[str, int]]:
    """Relations that lead to a cell, each with the cell it starts from."""
    row, column = divmod(target, SIDE)
    found = []
    for relation, (down, right) in _STEPS.items():
        anchor_row, anchor_column = row - down, column - right
        if 0 <= anchor_row < SIDE and 0 <= anchor_column < SIDE:
            found.append((relation, anchor_row * SIDE + anchor_column))
    return found


def _cell(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)


def _compose(cells: Sequence[Image.Image]) -> Image.Image:
    window = Image.new("RGB", (SIDE * CELL, SIDE * CELL), "white")
    for index, cell in enumerate(cells):
        row, column = divmod(index, SIDE)
        window.paste(cell, (column * CELL, row * CELL))
    return window
