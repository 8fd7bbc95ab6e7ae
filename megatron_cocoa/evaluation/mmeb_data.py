"""MMEB-eval's parquet files to queries and candidate lists over the distinct things to embed.

A thing is a (text, image path) pair as it stands in the file; each distinct one is embedded once. Nothing is skipped:
a malformed row or a missing picture stops the evaluation, because a score over fewer rows is another score.
"""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from megatron_cocoa.data.row_parsing import plain, without_marks
from megatron_cocoa.data.rows import IMAGE_TOKEN, PLACEHOLDER, Content
from megatron_cocoa.evaluation.mmeb_tasks import Task
from megatron_cocoa.parallel.threads import map_ahead

COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
NUM_THREADS = 8
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")


class EvalItem(NamedTuple):
    """One thing to embed, as in the file: ``<|image_1|>`` marks the picture's place; empty path, no picture."""

    text: str
    image_path: str

    @property
    def words(self) -> str:
        """The text without the marks of pictures, and without blanks around it."""
        return plain(self.text)

    def content(self) -> Content:
        """The item with placeholder and path in agreement.

        A picture without a marked place comes first; a placeholder without a picture goes; everything else stays as
        it stands, as in training (``row_parsing.without_marks``).

        Raises:
            ValueError: for several places, the mark of another picture, or neither text nor picture.
        """
        if not self.image_path:
            text = without_marks(self.text)
            if not text.strip():
                raise ValueError("it has neither text nor picture")
            return Content(text)
        marks = [match[0] for match in PLACEHOLDER.finditer(self.text)]
        if marks not in ([], [IMAGE_TOKEN]):
            raise ValueError(f"its text has the marks {', '.join(marks)} for one picture: needed {IMAGE_TOKEN} once")
        return Content(self.text if marks else IMAGE_TOKEN + self.text, self.image_path)

    def without_picture(self) -> EvalItem | None:
        """The text alone; None where nothing is left, or nothing was taken away."""
        return EvalItem(self.words, "") if self.words and self.image_path else None

    def without_text(self) -> EvalItem | None:
        """The picture alone; None where nothing is left, or nothing was taken away."""
        return EvalItem(IMAGE_TOKEN, self.image_path) if self.words and self.image_path else None


@dataclass(frozen=True)
class TaskData:
    """One task's test rows.

    Args:
        task: which.
        items: the distinct things to embed.
        queries: int64 ``(rows,)``, indices into ``items``.
        candidates: for each row int64 ``(candidates,)``, indices into ``items``, the right one first.
        sha256: of the files, in order.
    """

    task: Task
    items: tuple[EvalItem, ...]
    queries: np.ndarray
    candidates: tuple[np.ndarray, ...]
    sha256: str


def read_task(data_path: str | Path, task: Task) -> TaskData:
    """Read one task.

    Args:
        data_path: holds ``TASK/test-*.parquet`` (as MMEB-eval has it), ``TASK/test.parquet`` or ``TASK.parquet``.
        task: which.

    Raises:
        ValueError: if files are missing or broken, or naming the first malformed row.
    """
    files = task_files(data_path, task.name)
    index: dict[EvalItem, int] = {}
    queries: list[int] = []
    candidates: list[np.ndarray] = []
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
        for row, values in enumerate(_rows(file)):
            where = f"{file}, row {row}"
            query, offered = _row(values, where)
            for item in (query, *offered):
                if item not in index:
                    _check(item, where)
                    index[item] = len(index)
            queries.append(index[query])
            candidates.append(np.array([index[item] for item in offered], dtype=np.int64))
    if not queries:
        raise ValueError(f"{files[0]} has no rows: task {task.name} cannot be scored")
    return TaskData(task, tuple(index), np.array(queries, dtype=np.int64), tuple(candidates), digest.hexdigest())


def task_files(data_path: str | Path, name: str) -> list[Path]:
    """The test files of a task, in order.

    Raises:
        ValueError: if there is none, or a shard of those that the names announce is missing.
    """
    folder = Path(data_path)
    for found in (
        sorted((folder / name).glob("test-*.parquet")),
        [folder / name / "test.parquet"],
        sorted((folder / name / "test").glob("*.parquet")),
        [folder / f"{name}.parquet"],
    ):
        if found and all(file.is_file() for file in found):
            break
    else:
        raise ValueError(
            f"{folder} has no {name}/test-*.parquet: needed local files as in the repository TIGER-Lab/MMEB-eval "
            f"(also read: {name}/test.parquet, {name}/test/*.parquet, {name}.parquet)"
        )
    announced = {int(match[2]) for file in found if (match := _SHARD.search(file.name))}
    if announced and announced != {len(found)}:
        raise ValueError(f"{folder / name} has {len(found)} of {max(announced)} shards: copy the others, too")
    return found


def picture_bytes(items: Iterable[EvalItem], image_root: str | Path) -> dict[str, int | None]:
    """The size of each picture's file, None where there is none below the root; each is asked for once.

    Raises:
        ValueError: for a path that leaves the root.
    """
    paths = list(dict.fromkeys(item.image_path for item in items if item.image_path))
    root = Path(image_root).resolve()

    def size(path: str) -> int | None:
        try:
            found = picture_file(root, path).stat()
        except OSError:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    # Threads, since a file system of a cluster answers each question late, and many at once.
    sizes = map_ahead(size, paths, num_workers=NUM_THREADS, num_ahead=16 * NUM_THREADS)
    return dict(zip(paths, sizes))


def pictures_sha256(items: Iterable[EvalItem], sizes: Mapping[str, int | None]) -> str:
    """A hash over the paths and sizes of all pictures: it tells pictures of another resolution, and reads none."""
    digest = hashlib.sha256()
    for path in sorted({item.image_path for item in items if item.image_path}):
        digest.update(f"{path}\n{sizes[path]}\n".encode())
    return digest.hexdigest()


def picture_file(image_root: str | Path, image_path: str) -> Path:
    """Where a picture is.

    Raises:
        ValueError: if the path leaves the root, by being absolute, by ``..`` or by a link.
    """
    root = Path(image_root).resolve()
    path = (root / image_path).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"image path {image_path!r} leaves the image root {root}")
    return path


def _rows(file: Path) -> Iterable[dict[str, Any]]:
    try:
        source = pyarrow.parquet.ParquetFile(file)
        missing = [name for name in COLUMNS if name not in source.schema_arrow.names]
        if missing:
            found = ", ".join(source.schema_arrow.names)
            raise ValueError(f"{file} has no column {', '.join(missing)} (found: {found}): needed MMEB-eval's columns")
        for batch in source.iter_batches(columns=list(COLUMNS)):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not readable parquet: {error}") from error


def _row(values: dict[str, Any], where: str) -> tuple[EvalItem, list[EvalItem]]:
    query = EvalItem(_text(values, "qry_text", where), _text(values, "qry_img_path", where))
    texts, paths = (_texts(values, name, where) for name in COLUMNS[2:])
    if len(texts) != len(paths) or not texts:
        found = f"tgt_text has {len(texts)} entries, tgt_img_path {len(paths)}"
        raise ValueError(f"{where}: {found}: needed as many in both, and one at least")
    return query, [EvalItem(text, path) for text, path in zip(texts, paths)]


def _text(values: dict[str, Any], column: str, where: str) -> str:
    value = values[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column} is a {type(value).__name__}, needed text")
    return value


def _texts(values: dict[str, Any], column: str, where: str) -> Sequence[str]:
    value = values[column]
    if not isinstance(value, list) or not all(entry is None or isinstance(entry, str) for entry in value):
        raise ValueError(f"{where}: {column} is {type(value).__name__}, needed a list of texts")
    return [entry or "" for entry in value]


def _check(item: EvalItem, where: str) -> None:
    try:
        item.content()
    except ValueError as error:
        raise ValueError(f"{where}: {tuple(item)!r} cannot be embedded: {error}") from error
