"""Raw data to the file that a stage reads, with a manifest of what was read, turned round, left out and written.

What is written has the form of docs/data.md, so that a stage reads it like any JSONL. Everything is written under other
names and renamed at the end, the manifest last: what has its final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from tqdm import tqdm

from megatron_cocoa.config import SourceSettings
from megatron_cocoa.data.checksums import sha256_of
from megatron_cocoa.data.decode import PictureError, picture_size, read_picture
from megatron_cocoa.data.rows import CaptionRow, Content, PairRow
from megatron_cocoa.data.source_list import source_rows
from megatron_cocoa.data.stored import PictureRef, open_picture

PictureCheck = Literal["none", "header", "decode"]


@dataclass(frozen=True)
class Preparation:
    """What to prepare, and how.

    Args:
        stage: ``warmup``, ``bridge`` or ``contrastive``.
        sources: read one after the other; their ``stages`` do not matter.
        output: folder for ``<stage>.jsonl``, ``<stage>.rejected.jsonl`` and ``<stage>.manifest.json``.
        copy_pictures: copy pictures to ``output/images`` under the hash of their bytes; else paths stay as they are,
            relative to the sources' ``image_root``. Pictures inside shards and Arrow files are always copied.
        with_negatives: in stage ``contrastive``, keep hard negatives; a row whose negatives cannot be used is rejected.
        check: what of each picture is read to find unusable ones.
        seed: draws ``max_rows``.
        overwrite: replace an earlier file of the stage.
    """

    stage: str
    sources: tuple[SourceSettings, ...]
    output: Path
    copy_pictures: bool = False
    with_negatives: bool = True
    check: PictureCheck = "header"
    seed: int = 1234
    overwrite: bool = False


@dataclass
class _Work:
    """What is open and counted while rows are written."""

    plan: Preparation
    scratch: Path
    rows: IO[str]
    rejected: IO[str]
    counts: Counter = field(default_factory=Counter)
    pictures: dict[PictureRef, str] = field(default_factory=dict)
    reasons: Counter = field(default_factory=Counter)
    first_rejected: str | None = None

    def reject(self, row_id: str, reason: str, message: str | None = None) -> None:
        self.first_rejected = self.first_rejected or f"{row_id}: {message or reason}"
        self.reasons[reason] += 1
        self.rejected.write(json.dumps({"id": row_id, "reason": reason}, ensure_ascii=False) + "\n")


def prepare(plan: Preparation, *, progress: bool = True) -> dict:
    """Write the file of a stage and its manifest.

    Args:
        plan: see there.
        progress: show a bar on stderr.

    Returns:
        The manifest.

    Raises:
        ValueError: as ``source_list.source_rows``, for a file that is there already, or if no row is left.
    """
    target = plan.output / f"{plan.stage}.jsonl"
    if target.exists() and not plan.overwrite:
        raise ValueError(f"{target} exists: name another --output, or pass --overwrite")
    plan.output.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{plan.stage}.", suffix=".partial", dir=plan.output))
    try:
        manifest = _write(plan, scratch, progress)
        _publish(plan, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def _write(plan: Preparation, scratch: Path, progress: bool) -> dict:
    """Write rows, rejected rows and the manifest into ``scratch``; returns the manifest."""
    names = (f"{plan.stage}.jsonl", f"{plan.stage}.rejected.jsonl")
    with ExitStack() as stack:
        files = [stack.enter_context((scratch / name).open("w", encoding="utf-8")) for name in names]
        work = _Work(plan, scratch, *files)
        inputs = [_write_source(source, plan, work, progress) for source in plan.sources]
    if not work.counts["rows"]:
        first = f", the first one {work.first_rejected}" if work.first_rejected else ""
        raise ValueError(f"no row is left for stage {plan.stage}: all were rejected ({dict(work.reasons)}){first}")
    manifest = {
        "stage": plan.stage,
        "rows": work.counts["rows"],
        "flipped": sum(source["flipped"] for source in inputs),
        "rejected": dict(work.reasons),
        "pictures": {"distinct": len(work.pictures), "check": plan.check, "copied_bytes": work.counts["copied_bytes"]},
        "seed": plan.seed,
        "inputs": inputs,
        "files": {
            name: {"bytes": (scratch / name).stat().st_size, "sha256": sha256_of(scratch / name)} for name in names
        },
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    (scratch / f"{plan.stage}.manifest.json").write_text(text, encoding="utf-8")
    return manifest


def _write_source(source: SourceSettings, plan: Preparation, work: _Work, progress: bool) -> dict:
    """Write the rows of one source; returns its entry in the manifest."""
    before, reasons = work.counts["rows"], Counter(work.reasons)
    found = source_rows(source, plan.stage, seed=plan.seed, with_negatives=plan.with_negatives, on_drop=work.reject)
    if "over_max_rows" in found.dropped:
        work.reasons["over_max_rows"] += found.dropped["over_max_rows"]
    for row in tqdm(found.rows, desc=source.name, unit="row", disable=not progress):
        _write_row(row, work)
    return {
        "name": source.name,
        "path": str(source.path),
        "format": source.format,
        "split": source.split,
        "bytes": _size(Path(source.path)),
        "rows": work.counts["rows"] - before,
        "flipped": found.flipped,
        "rejected": dict(work.reasons - reasons),
    }


def _write_row(row: CaptionRow | PairRow, work: _Work) -> None:
    try:
        record = _record(row, work)
    except PictureError as error:
        work.reject(row.row_id, error.reason, str(error))
        return
    work.counts["rows"] += 1
    work.rows.write(json.dumps(record, ensure_ascii=False) + "\n")


def _record(row: CaptionRow | PairRow, work: _Work) -> dict:
    if isinstance(row, CaptionRow):
        picture = _picture(row.image_path, work)
        return {"id": row.row_id, "image_path": picture, "caption": row.caption, "source": row.source}
    negatives = {
        "neg_text": [content.text for content in row.negatives],
        "neg_image_path": [_paths(content, work) for content in row.negatives],
    }
    return {
        "id": row.row_id,
        "qry": row.query.text,
        "qry_image_path": _paths(row.query, work),
        "pos_text": row.target.text,
        "pos_image_path": _paths(row.target, work),
        "source": row.source,
        **(negatives if row.negatives else {}),
    }


def _paths(content: Content, work: _Work) -> str | list[str]:
    found = [_picture(ref, work) for ref in content.images]
    return found if len(found) > 1 else "".join(found)


def _picture(ref: PictureRef, work: _Work) -> str:
    """Where the picture will be found; checked, and copied if it must be, once."""
    if ref not in work.pictures:
        source = open_picture(ref, Path.cwd())
        name = source if isinstance(source, Path) else str(ref)
        if work.plan.check == "decode":
            read_picture(source, name=name)
        elif work.plan.check == "header":
            picture_size(source, name=name)
        is_file = isinstance(ref, str) or ref.kind == "file"
        path = ref if isinstance(ref, str) else ref.path
        work.pictures[ref] = path if is_file and not work.plan.copy_pictures else _copied(ref, work)
    return work.pictures[ref]


def _copied(ref: PictureRef, work: _Work) -> str:
    source = open_picture(ref, Path.cwd())
    if isinstance(source, Path) and not source.is_file():
        raise PictureError("missing_picture", f"{source} is not a file")
    data = source.read_bytes() if isinstance(source, Path) else source.read()
    digest = hashlib.sha256(data).hexdigest()
    # Decoders go by the content: the name needs no extension, and a row's own name never becomes a path.
    name = f"images/{digest[:2]}/{digest}"
    target = work.scratch / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        work.counts["copied_bytes"] += len(data)
    return name


def _publish(plan: Preparation, scratch: Path) -> None:
    for picture in sorted((scratch / "images").glob("*/*")):
        target = plan.output / picture.relative_to(scratch)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(picture, target)
    for name in (f"{plan.stage}.rejected.jsonl", f"{plan.stage}.jsonl", f"{plan.stage}.manifest.json"):
        os.replace(scratch / name, plan.output / name)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def sources_under(
    path: Path, kind: str, *, subsets: Sequence[str] = (), image_root: str | None = None, **options: object
) -> tuple[SourceSettings, ...]:
    """The sources in ``path``: each subset's folder of MMEB-train, or the one that ``path`` is.

    Args:
        path: what the format reads, or for ``mmeb-train`` also the folder of all subsets.
        kind: of ``SourceSettings.format``.
        subsets: of MMEB-train; empty takes every folder that holds parquet files.
        image_root, options: fields of ``SourceSettings``.

    Raises:
        ValueError: if a subset is not there, or ``subsets`` are named for another format.
    """
    if kind != "mmeb-train" or any(path.glob("*.parquet")):
        if subsets:
            raise ValueError(f"--subsets {' '.join(subsets)} has no effect here: {path} is no folder of subsets")
        return (SourceSettings(path.stem or "data", str(path), kind, image_root=image_root, **options),)
    names = list(subsets) or sorted(folder.name for folder in path.glob("*") if any(folder.glob("*.parquet")))
    missing = [name for name in names if not (path / name).is_dir()]
    if missing or not names:
        raise ValueError(f"{path} has no subset {', '.join(missing) or 'at all'}: it needs folders with parquet files")
    root = image_root or str(path)
    return tuple(SourceSettings(name, str(path / name), kind, image_root=root, **options) for name in names)
