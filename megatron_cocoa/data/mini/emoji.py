"""Emoji in two art styles with one split: retrieval by caption and across styles, and classification by group.

The split is the quick start's function over the pictures of all styles together, the quick start's among them. A
concept that the function puts on one side here and on the other side there is in neither part: so a model of the quick
start, or one trained on this benchmark's training part, has seen no picture, twin or name of what it is scored on.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_cocoa.data.concepts import THUMBNAIL_SIDE, TWIN_CORRELATION, assign_splits
from megatron_cocoa.data.decode import accept_picture, read_picture
from megatron_cocoa.data.mini.leaks import largest_correlation
from megatron_cocoa.data.mini.packages import EMOJIBASE, FLUENT, NOTO_SHEET, fetch, members
from megatron_cocoa.data.mini.rows import EvalRow, Pair, PictureFolder, Side, TaskRows, generator, gold_first, picture
from megatron_cocoa.data.toy import collect_emojis

STYLES = ("noto", "fluent")
SIDE = 72
_COMPONENTS = 2
_CELL, _BORDER = 64, 1
_MAX_TAGS = 4
_MAX_PER_GROUP = 25
PROMPTS = {
    "group": "Represent the given image for classification",
    "t2i": "Find an image that matches the given caption: ",
    "i2t": "Find an image caption describing the given image.",
    "style": "Find the same thing drawn in another style.",
    "image": "Represent the given image.",
}


@dataclass(frozen=True)
class Emoji:
    """One emoji in one style.

    key: code points, which are the same in every style.  style: of ``STYLES``.  name, caption, group: words.
    path: of its picture.  split: ``train`` or ``heldout``.  thumbnail: uint8 ``(side, side, 3)``.
    """

    key: str
    style: str
    name: str
    caption: str
    concept: str
    group: str
    path: str
    split: str
    thumbnail: np.ndarray


@dataclass(frozen=True)
class _Drawn:
    key: str
    style: str
    name: str
    concept_name: str
    tags: tuple[str, ...]
    group: str
    image: Image.Image


def read_emojis(downloads: Path, pictures: PictureFolder) -> tuple[list[Emoji], int, np.ndarray]:
    """Write the pictures of both styles, split.

    Args:
        downloads: folder of archives.
        pictures: where pictures go.

    Returns:
        The emojis, in the order of Unicode's list, style by style; how many were left out because the two splits
        disagree; and the quick start's training thumbnails, uint8 ``(pictures, side, side, 3)``.
    """
    quick = collect_emojis()
    quick_thumbnails = np.stack([_thumbnail(read_picture(item.picture)) for item in quick])
    quick_names = {_key(item.picture.stem): item.name for item in quick}
    drawn = list(_drawn(downloads, quick_names))
    thumbnails = np.stack([_thumbnail(item.image) for item in drawn])
    names = [item.name for item in quick]
    quick_concepts, quick_splits = assign_splits(names, quick_thumbnails)
    together = assign_splits(
        names + [item.concept_name for item in drawn], np.concatenate([quick_thumbnails, thumbnails])
    )
    concepts, splits = (part[len(quick) :] for part in together)
    known = dict(zip(quick_concepts, quick_splits))
    trained_on = quick_thumbnails[[split == "train" for split in quick_splits]]
    # A group of twins may have come to another side by what joined it: its pictures are twins all the same.
    seen = largest_correlation(thumbnails, trained_on) > TWIN_CORRELATION
    found = []
    for item, concept, split, thumbnail, is_seen in zip(drawn, concepts, splits, thumbnails, seen):
        if known.get(concept, split) != split or (split == "heldout" and is_seen):
            continue
        path = pictures.write(item.style, item.key, item.image)
        caption = ", ".join((item.name, *item.tags))
        found.append(
            Emoji(item.key, item.style, item.name, caption, concept, item.group, path, split, thumbnail)
        )
    return found, len(drawn) - len(found), trained_on


def _drawn(downloads: Path, quick_names: dict[str, str]) -> Iterable[_Drawn]:
    texts = dict(members(fetch(EMOJIBASE, downloads), lambda name: name.startswith("package/en/")))
    entries = json.loads(texts["package/en/data.json"])
    groups = {g["order"]: g["message"] for g in json.loads(texts["package/en/messages.json"])["groups"]}
    entries = [e for e in entries if e.get("group") not in (None, _COMPONENTS)]
    for style, images in (("noto", _noto(downloads)), ("fluent", _fluent(downloads))):
        for entry in entries:
            key = _key(entry["hexcode"])
            if key in images:
                name = entry["label"]
                tags = [tag for tag in entry.get("tags", ()) if tag not in name][:_MAX_TAGS]
                image = images[key].resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                # The split goes by the quick start's name of the same emoji where it has one: flags differ.
                concept_name = quick_names.get(key, name)
                yield _Drawn(key, style, name, concept_name, tuple(tags), groups[entry["group"]], image)


def _noto(downloads: Path) -> dict[str, Image.Image]:
    """Cells of the sprite sheet at the coordinates that the package publishes."""
    wanted = {"package/emoji.json": b"", "package/img/google/sheets-clean/64.png": b""}
    found = dict(members(fetch(NOTO_SHEET, downloads), wanted.__contains__))
    cells = {}
    step = _CELL + 2 * _BORDER
    with Image.open(io.BytesIO(found["package/img/google/sheets-clean/64.png"]), formats=["PNG"]) as sheet:
        for entry in json.loads(found["package/emoji.json"]):
            if entry["has_img_google"]:
                left, top = entry["sheet_x"] * step + _BORDER, entry["sheet_y"] * step + _BORDER
                cell = sheet.crop((left, top, left + _CELL, top + _CELL))
                cells[_key(entry["unified"])] = accept_picture(cell, f"sheet cell {entry['unified']}")
    return cells


def _fluent(downloads: Path) -> dict[str, Image.Image]:
    found = {}
    for name, content in members(fetch(FLUENT, downloads), lambda name: name.endswith(".webp")):
        with Image.open(io.BytesIO(content), formats=["WEBP"]) as image:
            found[_key(Path(name).stem)] = accept_picture(image, name)
    return found


def _key(codes: str) -> str:
    """Code points without variation selectors and leading zeros, as the packages differ in both."""
    parts = (part.lstrip("0").lower() for part in codes.split("-"))
    return "-".join(part for part in parts if part != "fe0f")


def _thumbnail(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX))


def emoji_tasks(emojis: Sequence[Emoji]) -> list[TaskRows]:
    """Classification by Unicode's group, captions to pictures and back, and one style to the other."""
    noto, fluent = ([e for e in emojis if e.style == style] for style in STYLES)
    return [_by_group(emojis, noto), _t2i(emojis, noto), _i2t(emojis, fluent), _across_styles(noto, fluent)]


def _heldout(emojis: Sequence[Emoji]) -> list[Emoji]:
    return [emoji for emoji in emojis if emoji.split == "heldout"]


def _trained(emojis: Sequence[Emoji]) -> list[Emoji]:
    return [emoji for emoji in emojis if emoji.split == "train"]


def _by_group(emojis: Sequence[Emoji], noto: Sequence[Emoji]) -> TaskRows:
    names = list(dict.fromkeys(emoji.group for emoji in emojis))

    def query(emoji: Emoji) -> Side:
        return picture(PROMPTS["group"], emoji.path)

    rows = []
    for name in names:
        # As many of each group at most, or the largest group would be a good guess.
        members = [emoji for emoji in _heldout(noto) if emoji.group == name]
        chosen = generator("group", name).sample(members, min(len(members), _MAX_PER_GROUP))
        rows += [EvalRow(query(e), gold_first(Side(e.group), map(Side, names))) for e in chosen]
    train = [Pair(query(e), Side(e.group)) for e in _trained(emojis)]
    return TaskRows("EmojiCategory", "classification", "ind", rows, train)


def _t2i(emojis: Sequence[Emoji], noto: Sequence[Emoji]) -> TaskRows:
    pool = [picture(PROMPTS["image"], emoji.path) for emoji in _heldout(noto)]
    rows = [
        EvalRow(Side(PROMPTS["t2i"] + emoji.caption), gold_first(side, pool))
        for emoji, side in zip(_heldout(noto), pool)
    ]
    train = [Pair(Side(PROMPTS["t2i"] + e.caption), picture(PROMPTS["image"], e.path)) for e in _trained(emojis)]
    return TaskRows("EmojiCaption_t2i", "retrieval", "ind", rows, train)


def _i2t(emojis: Sequence[Emoji], fluent: Sequence[Emoji]) -> TaskRows:
    pool = [Side(emoji.caption) for emoji in _heldout(fluent)]
    rows = [
        EvalRow(picture(PROMPTS["i2t"], emoji.path), gold_first(Side(emoji.caption), pool))
        for emoji in _heldout(fluent)
    ]
    train = [Pair(picture(PROMPTS["i2t"], e.path), Side(e.caption)) for e in _trained(emojis)]
    return TaskRows("EmojiCaption_i2t", "retrieval", "ind", rows, train)


def _across_styles(noto: Sequence[Emoji], fluent: Sequence[Emoji]) -> TaskRows:
    other = {emoji.key: emoji for emoji in fluent}
    both = [(emoji, other[emoji.key]) for emoji in noto if emoji.key in other and not _same_drawing(emoji, other)]

    def pair(a: Emoji, b: Emoji) -> Pair:
        return Pair(picture(PROMPTS["style"], a.path), picture(PROMPTS["image"], b.path))

    held = [pair(a, b) for a, b in both if a.split == "heldout"]
    rows = [EvalRow(p.query, gold_first(p.target, (q.target for q in held))) for p in held]
    return TaskRows("EmojiStyle_i2i", "retrieval", "ind", rows, [pair(a, b) for a, b in both if a.split == "train"])


def _same_drawing(emoji: Emoji, other: dict[str, Emoji]) -> bool:
    """Flags and plain signs look alike in both styles: comparing pixels would find them."""
    pair = (np.ravel(e.thumbnail).astype(np.float64) for e in (emoji, other[emoji.key]))
    return bool(np.corrcoef(*pair)[0, 1] > 0.9)
