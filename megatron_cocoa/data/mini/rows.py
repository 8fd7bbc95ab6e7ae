"""Rows of the mini benchmark, and how they are written: MMEB-eval's and MMEB-train's parquet, and JSONL."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet
from PIL import Image

from megatron_cocoa.data.rows import IMAGE_TOKEN

SEED = 1234


@dataclass(frozen=True)
class Side:
    """A query or a target: text with ``<|image_1|>`` where its picture goes, and the picture's path or nothing."""

    text: str
    image: str = ""


@dataclass(frozen=True)
class EvalRow:
    """A query and its candidates, the right one first."""

    query: Side
    targets: tuple[Side, ...]


@dataclass(frozen=True)
class Pair:
    """A query and its target, to train on."""

    query: Side
    target: Side


@dataclass
class TaskRows:
    """One task: what it is, the rows that score it, and its training counterpart (none out of distribution)."""

    name: str
    meta_task: str
    split: str
    eval_rows: list[EvalRow]
    train: list[Pair] = field(default_factory=list)


def picture(prompt: str, image: str) -> Side:
    """A picture with words after it, in the manner of MMEB's prompts."""
    return Side(f"{IMAGE_TOKEN}\n{prompt}" if prompt else IMAGE_TOKEN, image)


def generator(*key: object) -> random.Random:
    """Random numbers that follow from names alone."""
    return random.Random("/".join(map(str, (SEED, *key))))


def gold_first(gold: Side, others: Iterable[Side]) -> tuple[Side, ...]:
    """Candidates with the right one first, the others in their order, each once."""
    return tuple(dict.fromkeys((gold, *others)))


class PictureFolder:
    """Writes PNG files below ``root/images`` under names of our own.

    Args:
        root: of the benchmark; paths are relative to it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def write(self, source: str, name: str, image: Image.Image) -> str:
        """Write a picture and return its path; ``source`` and ``name`` are single path parts."""
        for part in (source, name):
            assert part and "/" not in part and not part.startswith("."), part
        path = Path("images") / source / f"{name}.png"
        (self._root / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(self._root / path, compress_level=4)
        return path.as_posix()


def write_eval(root: Path, task: TaskRows) -> None:
    """``root/eval/TASK/test-00000-of-00001.parquet``."""
    columns = {
        "qry_text": [row.query.text for row in task.eval_rows],
        "qry_img_path": [row.query.image for row in task.eval_rows],
        "tgt_text": [[side.text for side in row.targets] for row in task.eval_rows],
        "tgt_img_path": [[side.image for side in row.targets] for row in task.eval_rows],
    }
    _write_parquet(root / "eval" / task.name / "test-00000-of-00001.parquet", columns)


def write_train(root: Path, task: TaskRows) -> None:
    """``root/train/TASK/train-00000-of-00001.parquet``; hard negatives stay empty until they are mined."""
    pairs = task.train
    columns = {
        "qry": [pair.query.text for pair in pairs],
        "qry_image_path": [pair.query.image for pair in pairs],
        "pos_text": [pair.target.text for pair in pairs],
        "pos_image_path": [pair.target.image for pair in pairs],
        "neg_text": [""] * len(pairs),
        "neg_image_path": [""] * len(pairs),
    }
    _write_parquet(root / "train" / task.name / "train-00000-of-00001.parquet", columns)


def pair_record(row_id: str, pair: Pair) -> dict[str, str]:
    """A line of ``contrastive.jsonl`` or ``bridge.jsonl``."""
    return {
        "id": row_id,
        "qry": pair.query.text,
        "qry_image_path": pair.query.image,
        "pos_text": pair.target.text,
        "pos_image_path": pair.target.image,
    }


def write_jsonl(path: Path, records: Sequence[dict]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _write_parquet(path: Path, columns: dict[str, list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
