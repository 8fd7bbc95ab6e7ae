"""``golden.json``: a few inputs and their vectors, so that any installation can be checked against the exporter's.

Vectors are compared by cosine, in fp32 on both sides. Two correct installations differ by the order of their sums,
which moves a vector by about 1e-6 of its length, and one minus the cosine by the square of that.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

GOLDEN_FILE = "golden.json"
FORMAT = 1

BOUND = 1e-6
"""Largest one minus cosine that is accepted: far above rounding, far below what a wrong weight or pixel makes."""

_TEXTS = ("a", "a red house beside two small trees", "Grüße aus Köln: 12 Äpfel, 3 €")
_SIZES = ((56, 56), (90, 140), (130, 75))

Embed = Callable[[str, Image.Image | None], np.ndarray]
"""``(text, picture or None)`` to a vector ``(hidden,)``."""


@dataclass(frozen=True)
class GoldenInput:
    """One input: a text (empty for none) and a picture (None for none)."""

    name: str
    text: str
    image: Image.Image | None


@dataclass(frozen=True)
class GoldenResult:
    """How far one input's vector is from the recorded one: ``distance`` is one minus their cosine, in fp64."""

    name: str
    distance: float

    @property
    def passed(self) -> bool:
        # NaN compares as false, and so fails.
        return self.distance <= BOUND


def golden_inputs() -> list[GoldenInput]:
    """Texts, pictures of several shapes, and both; the same at every call."""
    pictures = [_picture(width, height) for width, height in _SIZES]
    texts = [GoldenInput(f"text {i}", text, None) for i, text in enumerate(_TEXTS)]
    images = [GoldenInput(f"picture {p.width} x {p.height}", "", p) for p in pictures]
    both = [
        GoldenInput(f"picture {p.width} x {p.height} and text {i}", text, p)
        for i, (text, p) in enumerate(zip(_TEXTS, pictures))
    ]
    return texts + images + both


def _picture(width: int, height: int) -> Image.Image:
    """Two gradients and a checkerboard: every patch is another, and PNG keeps the file small."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = (x * 255 // width, y * 255 // height, ((x // 9 + y // 9) % 2) * 255)
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def write_golden(folder: Path, embed: Embed) -> None:
    """Write ``golden.json`` into ``folder``, with vectors of ``embed``."""
    items = []
    for item in golden_inputs():
        vector = embed(item.text, item.image)
        items.append({
            "name": item.name,
            "text": item.text,
            "image_png_base64": None if item.image is None else _encode(item.image),
            "vector": [float(value) for value in vector],
        })  # fmt: skip
    content = {"format": FORMAT, "dtype": "float32", "largest_one_minus_cosine": BOUND, "items": items}
    (folder / GOLDEN_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def compare_golden(folder: str | Path, embed: Embed) -> list[GoldenResult]:
    """Embed the recorded inputs again.

    Raises:
        ValueError: if ``golden.json`` is missing or damaged, or the vectors have another length.
    """
    file = Path(folder) / GOLDEN_FILE
    if not file.is_file():
        raise ValueError(f"{file} does not exist: needed a folder of tools/convert_mcore_to_hf.py --format hf")
    results = []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or not content["items"]:
            raise ValueError(f"format {content['format']} with {len(content['items'])} items, needed format {FORMAT}")
        items = [(item["name"], item["text"], item["image_png_base64"], item["vector"]) for item in content["items"]]
        recorded = [(name, text, _decode(png), np.asarray(vector)) for name, text, png, vector in items]
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged: {error!r}; export the model again") from error
    for name, text, image, wanted in recorded:
        found = np.asarray(embed(text, image), dtype=np.float64)
        if found.shape != wanted.shape:
            raise ValueError(f"{name}: the vector has shape {found.shape}, recorded is {wanted.shape}")
        cosine = found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted)
        results.append(GoldenResult(name, float(1 - cosine)))
    return results


def _encode(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")


def _decode(text: str | None) -> Image.Image | None:
    if text is None:
        return None
    with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
        return image.convert("RGB")
