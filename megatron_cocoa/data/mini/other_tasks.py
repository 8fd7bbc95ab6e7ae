"""Tasks from other packages: clothes by class, coloured shapes by question, and clip art by its title."""

from __future__ import annotations

import collections
import gzip
import html
import io
import json
import re
import struct
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_cocoa.data.concepts import THUMBNAIL_SIDE, picture_twins
from megatron_cocoa.data.decode import PictureError, accept_picture
from megatron_cocoa.data.mini.leaks import CHECK_SIDE, keep_unlike, thumbnails_of
from megatron_cocoa.data.mini.packages import CLIP_ART, CLIP_ART_TITLES, EASY_VQA, FASHION_MNIST, fetch, members
from megatron_cocoa.data.mini.rows import EvalRow, Pair, PictureFolder, Side, TaskRows, generator, gold_first, picture

FASHION_CLASSES = (
    "t-shirt or top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
_FASHION_FILES = "usr/share/datasets/fashion-mnist/t10k-{}-idx{}-ubyte.gz"
_PER_CLASS = 60
_YES_NO = ("no", "yes")
_VQA_ROWS = 600
_VQA_TRAIN_ROWS = 3000
_CLIP_ART_ROWS = 400
_CLIP_ART_SIDE = 96
_DROPPED_FOLDERS = ("computer/icons/flat-theme", "computer/icons/lemon-theme", "shapes/stars", "logos", "buttons")
_NO_CAPTION = re.compile(r"^(part of the flat|various cliparts|aiga_symbol|gramastar|gold-theme|pc connectors)", re.I)


def fashion_task(downloads: Path, pictures: PictureFolder) -> TaskRows:
    """Ten classes of clothes, as many test pictures of each; never trained on."""
    wanted = [_FASHION_FILES.format("images", 3), _FASHION_FILES.format("labels", 1)]
    found = dict(members(fetch(FASHION_MNIST, downloads), wanted.__contains__))
    images, labels = (np.frombuffer(gzip.decompress(found[name]), dtype=np.uint8) for name in wanted)
    images, labels = images[16:].reshape(-1, 28, 28), labels[8:]
    rows = []
    for label, name in enumerate(FASHION_CLASSES):
        for index in np.flatnonzero(labels == label)[:_PER_CLASS]:
            # White on black as published; twice the size, so that no processor has less than one unit of it.
            image = Image.fromarray(images[index]).convert("RGB").resize((56, 56), Image.Resampling.BICUBIC)
            path = pictures.write("fashion-mnist", f"{index:05d}", image)
            query = picture("Represent the given image for classification", path)
            rows.append(EvalRow(query, gold_first(Side(name), map(Side, FASHION_CLASSES))))
    return TaskRows("FashionMNIST", "classification", "ood", rows)


def vqa_tasks(downloads: Path, pictures: PictureFolder, root: Path, *, trained: Collection[str]) -> list[TaskRows]:
    """Questions on one coloured shape: open ones, and yes-or-no ones of which each text has both answers as often.

    Args:
        downloads: folder of archives.
        pictures: where pictures go, below ``root``.
        root: of the benchmark.
        trained: paths of the pictures that other tasks train on.
    """
    content = dict(members(fetch(EASY_VQA, downloads), lambda name: name.startswith("easy_vqa/data/")))
    answers = content["easy_vqa/data/answers.txt"].decode().split()
    parts = {part: json.loads(content[f"easy_vqa/data/{part}/questions.json"]) for part in ("test", "train")}

    def write(part: str) -> dict[int, str]:
        paths = {}
        for index in sorted({index for _, _, index in parts[part]}):
            with Image.open(io.BytesIO(content[f"easy_vqa/data/{part}/images/{index}.png"]), formats=["PNG"]) as image:
                paths[index] = pictures.write(f"easy-vqa-{part}", f"{index:05d}", image.convert("RGB"))
        return paths

    # A blue rectangle is also an emoji, and a test picture may look like one of another part.
    test = _without_twins(root, write("test"), trained)
    train = _without_twins(root, write("train"), test.values())
    tasks = []
    for kind in ("open", "yesno"):
        drawn = {
            part: _draw([row for row in parts[part] if row[2] in kept], kind, part)
            for part, kept in (("test", test), ("train", train))
        }
        offered = [Side(a) for a in answers if (a in _YES_NO) == (kind == "yesno")]

        def query(question: str, path: str) -> Side:
            return picture(f"Represent the given image with the following question: {question}", path)

        rows = [EvalRow(query(q, test[i]), gold_first(Side(a), offered)) for q, a, i in drawn["test"]]
        pairs = [Pair(query(q, train[i]), Side(a)) for q, a, i in drawn["train"]]
        tasks.append(TaskRows(f"EasyVQA_{kind}", "vqa", "ind", rows, pairs))
    used = {row.query.image for task in tasks for row in task.eval_rows}
    used |= {pair.query.image for task in tasks for pair in task.train}
    for path in {*test.values(), *train.values()} - used:
        (root / path).unlink()
    return tasks


def _draw(rows: Sequence[Sequence], kind: str, part: str) -> list[tuple[str, str, int]]:
    """A sample of questions of one kind, yes and no equally often for each text, in the order of the file."""
    chosen = [tuple(row) for row in rows if (row[1] in _YES_NO) == (kind == "yesno")]
    random = generator("vqa", kind, part)
    if kind == "yesno":
        by_text: dict[str, dict[str, list]] = {}
        for row in chosen:
            by_text.setdefault(row[0], {a: [] for a in _YES_NO})[row[1]].append(row)
        pairs = []
        for both in by_text.values():
            least = min(map(len, both.values()))
            pairs += list(zip(*(random.sample(both[answer], least) for answer in _YES_NO)))
        most = (_VQA_ROWS if part == "test" else _VQA_TRAIN_ROWS) // 2
        chosen = [row for pair in random.sample(pairs, min(most, len(pairs))) for row in pair]
    else:
        most = _VQA_ROWS if part == "test" else _VQA_TRAIN_ROWS
        chosen = random.sample(chosen, min(most, len(chosen)))
    return sorted(chosen, key=lambda row: (row[2], row[0]))


def _without_twins(root: Path, paths: dict[int, str], others: Collection[str]) -> dict[int, str]:
    """Those pictures that look like none of the others; the rest is removed."""
    kept = np.ones(len(paths), dtype=bool)
    # Small bright shapes on one ground: a coarse thumbnail alone misses some.
    for side in (THUMBNAIL_SIDE, CHECK_SIDE):
        kept &= keep_unlike(thumbnails_of(root, paths.values(), side), thumbnails_of(root, others, side))
    for path, keep in zip(paths.values(), kept):
        if not keep:
            (root / path).unlink()
    return {index: path for (index, path), keep in zip(paths.items(), kept) if keep}


def clip_art_task(downloads: Path, pictures: PictureFolder, *, trained: np.ndarray) -> TaskRows:
    """Titles to pictures of another art form, never trained on; titles and pictures are all different.

    Args:
        downloads: folder of archives.
        pictures: where pictures go.
        trained: uint8 ``(pictures, side, side, 3)``: what looks like one of these (flags do) is left out.
    """
    titles = _clip_art_titles(downloads)
    chosen = set(generator("clip-art").sample(sorted(titles), 3 * _CLIP_ART_ROWS))
    prefix = "usr/share/openclipart/png/"
    found: dict[str, Image.Image] = {}
    for name, content in members(fetch(CLIP_ART, downloads), lambda n: n[len(prefix) : -4] in chosen):
        image = _usable(content, name)
        if image is not None:
            found[name[len(prefix) : -4]] = image
    names = sorted(found)
    side = trained.shape[1]
    thumbnails = np.stack([np.asarray(found[name].resize((side, side), Image.Resampling.BOX)) for name in names])
    unlike = keep_unlike(thumbnails, trained)
    # Twins among themselves would make a right answer wrong: the first of each pair goes.
    unlike[picture_twins(thumbnails)[:, 0]] = False
    rows = []
    for name, keep in zip(names, unlike):
        if keep and len(rows) < _CLIP_ART_ROWS:
            path = pictures.write("clip-art", f"{len(rows):04d}", found[name])
            rows.append((titles[name], picture("Represent the given image.", path)))
    pool = [side for _, side in rows]
    prompt = "Find an image that matches the given caption: "
    return TaskRows(
        "ClipArt_t2i", "retrieval", "ood", [EvalRow(Side(prompt + t), gold_first(side, pool)) for t, side in rows]
    )


def _clip_art_titles(downloads: Path) -> dict[str, str]:
    """Path without suffix to title, for drawings in the public domain whose title no other has."""
    prefix = "usr/share/openclipart/svg/"
    found = {}
    archive = fetch(CLIP_ART_TITLES, downloads)
    for name, content in members(archive, lambda n: n.startswith(prefix) and n.endswith(".svg")):
        path = name[len(prefix) : -4]
        if path.startswith(_DROPPED_FOLDERS):
            continue
        text = content.decode("utf-8", errors="replace")
        metadata = re.search(r"<metadata.*?</metadata>", text, re.S)
        title = re.search(r"<dc:title[^>]*>(.*?)</dc:title>", metadata[0], re.S) if metadata else None
        if title is None or "publicdomain" not in metadata[0].lower():
            continue
        words = re.sub(r"^Clipart by [^-]+- *", "", " ".join(html.unescape(title[1]).replace("_", " ").split()))
        if 3 <= len(words) <= 80 and not _NO_CAPTION.match(words) and re.search("[a-z]{3}", words.lower()):
            found[path] = words.strip(" -")
    counts = collections.Counter(re.sub(r"[\W\d_]+", " ", title.lower()).strip() for title in found.values())
    return {p: t for p, t in found.items() if counts[re.sub(r"[\W\d_]+", " ", t.lower()).strip()] == 1}


def _usable(content: bytes, name: str) -> Image.Image | None:
    """The picture on white, at one size with borders; None for one that is too small, too narrow or nearly blank."""
    # From the header, before anything is decoded: some drawings are rendered at half a gigapixel.
    size = struct.unpack(">II", content[16:24])
    if min(size) < 32 or max(size) > 4 * min(size) or max(size) > 2000:
        return None
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as file:
            image = accept_picture(file, name)
    except (PictureError, OSError):
        return None
    image.thumbnail((_CLIP_ART_SIDE, _CLIP_ART_SIDE), Image.Resampling.LANCZOS)
    low, high = image.convert("L").getextrema()
    if high - low < 40:
        return None
    square = Image.new("RGB", (_CLIP_ART_SIDE, _CLIP_ART_SIDE), "white")
    square.paste(image, ((_CLIP_ART_SIDE - image.width) // 2, (_CLIP_ART_SIDE - image.height) // 2))
    return square
