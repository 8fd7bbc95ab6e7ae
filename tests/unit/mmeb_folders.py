"""A benchmark in MMEB-eval's form, small enough to score by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

Row = tuple[tuple[str, str], list[tuple[str, str]]]
"""A query and its candidates, each a text and an image path; the right candidate first."""


def write_task(folder: Path, name: str, rows: list[Row], *, file: str = "test-00000-of-00001.parquet") -> Path:
    """Write rows as MMEB-eval does, and return the file."""
    columns = {
        "qry_text": [query[0] for query, _ in rows],
        "qry_img_path": [query[1] for query, _ in rows],
        "tgt_text": [[text for text, _ in offered] for _, offered in rows],
        "tgt_img_path": [[path for _, path in offered] for _, offered in rows],
    }
    target = folder / name / file
    target.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), target)
    return target


def write_benchmark(folder: Path, tasks: dict[str, tuple[str, str]], *, name: str = "tiny") -> None:
    """Write ``benchmark.json``: task to meta-task and split."""
    rows = {task: {"meta_task": meta, "split": split} for task, (meta, split) in tasks.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps({"name": name, "tasks": rows}), encoding="utf-8")


def write_pictures(root: Path, num: int) -> list[str]:
    """Random pictures of several sizes; their paths relative to ``root``."""
    rng = np.random.default_rng(7)
    paths = [f"images/{i}.png" for i in range(num)]
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        sides = rng.choice([42, 70, 98], size=2)
        Image.fromarray(rng.integers(0, 256, (*sides, 3), dtype=np.uint8)).save(root / path)
    return paths


def write_small_benchmark(root: Path) -> None:
    """``root/eval`` with two tasks over ``root/images``: pictures to texts, and texts to pictures."""
    paths = write_pictures(root, 8)
    captions = [f"caption {'x' * (3 * i)} {i}" for i in range(8)]
    prompt = "<|image_1|>\nFind the caption."
    i2t = [((prompt, paths[i]), [(captions[j % 8], "") for j in range(i, i + 5)]) for i in range(8)]
    t2i = [((captions[i], ""), [("<|image_1|>\n", paths[j % 8]) for j in range(i, i + 4)]) for i in range(8)]
    write_task(root / "eval", "i2t", i2t)
    write_task(root / "eval", "t2i", t2i)
    write_benchmark(root / "eval", {"i2t": ("retrieval", "ind"), "t2i": ("retrieval", "ood")})
