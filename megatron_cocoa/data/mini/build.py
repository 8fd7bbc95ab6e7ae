"""Builds the mini benchmark: ten tasks in MMEB-eval's form with their training counterpart, or nothing.

Layout of the folder, whose root is also the image root and a data folder of the trainer::

    eval/TASK/test-00000-of-00001.parquet   eval/benchmark.json        MMEB-eval's form
    train/TASK/train-00000-of-00001.parquet                            MMEB-train's form
    warmup.jsonl  bridge.jsonl  contrastive.jsonl  eval_heldout.jsonl   the same rows for --data.path
    images/  manifest.json
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_cocoa.data.checksums import sha256_of
from megatron_cocoa.data.mini.emoji import Emoji, emoji_tasks, read_emojis
from megatron_cocoa.data.mini.grounding import grounding_tasks
from megatron_cocoa.data.mini.leaks import LeakReport, check_leaks
from megatron_cocoa.data.mini.other_tasks import clip_art_task, fashion_task, vqa_tasks
from megatron_cocoa.data.mini.packages import PACKAGES, Package
from megatron_cocoa.data.mini.rows import PictureFolder, TaskRows, pair_record, write_eval, write_jsonl, write_train
from megatron_cocoa.data.toy import CREDITS

NAME = "mini-1"
MANIFEST = "manifest.json"


def build(
    output: str | Path, *, downloads: str | Path, overwrite: bool = False, say: Callable[[str], None] = print
) -> dict:
    """Build the benchmark, which appears under its name when it is complete and free of leaks.

    Args:
        output: folder to create.
        downloads: folder for the packages' archives; those that are there and verify are not fetched again.
        overwrite: replace an earlier benchmark at ``output``.
        say: takes progress.

    Returns:
        The manifest: packages with licences and checksums, rows by task, leak check, checksums of what was written.

    Raises:
        ValueError: if a package cannot be had or is another one, the target may not be replaced, or something that is
            scored was found on the training side.
    """
    output, downloads = Path(output).absolute(), Path(downloads)
    _check_target(output, overwrite=overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    try:
        manifest = _build(scratch, downloads, say)
        scratch.chmod(0o755)
        if output.exists():
            shutil.rmtree(output)
        scratch.rename(output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def _check_target(output: Path, *, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST).is_file() or not (output / "eval").is_dir():
        raise ValueError(f"{output} holds something else than a benchmark: name a new folder")
    if not overwrite:
        raise ValueError(f"{output} holds a benchmark already: name a new folder, or pass --overwrite")


def _build(root: Path, downloads: Path, say: Callable[[str], None]) -> dict:
    pictures = PictureFolder(root)
    say("emoji: reading and splitting two art styles")
    emojis, num_left_out, quick_start = read_emojis(downloads, pictures)
    tasks = emoji_tasks(emojis)
    say("grounding: composing windows")
    tasks += grounding_tasks(emojis, pictures, root)
    say("shapes, clothes and clip art")
    trained_paths = [emoji.path for emoji in emojis if emoji.split == "train"]
    tasks += vqa_tasks(downloads, pictures, root, trained=trained_paths)
    tasks.append(fashion_task(downloads, pictures))
    trained = np.stack([emoji.thumbnail for emoji in emojis if emoji.split == "train"])
    tasks.append(clip_art_task(downloads, pictures, trained=np.concatenate([quick_start, trained])))
    say("comparing what is scored with what is trained on")
    sides = [[e for e in emojis if e.split == split] for split in ("heldout", "train")]
    leaks = check_leaks(
        root,
        tasks,
        quick_start=quick_start,
        concepts=tuple({e.concept for e in side} for side in sides),
        captions=tuple({e.caption.casefold() for e in side} for side in sides),
    )
    if leaks.problems:
        shown = "; ".join(leaks.problems[:5])
        raise ValueError(f"{len(leaks.problems)} leak(s) between the training and the scored part: {shown}")
    _write(root, tasks, emojis)
    manifest = _manifest(root, tasks, leaks, num_left_out)
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _write(root: Path, tasks: Sequence[TaskRows], emojis: Sequence[Emoji]) -> None:
    for task in tasks:
        write_eval(root, task)
        if task.train:
            write_train(root, task)
    table = {task.name: {"meta_task": task.meta_task, "split": task.split} for task in tasks}
    benchmark = {"name": NAME, "tasks": table, "credits": _credits()}
    (root / "eval" / "benchmark.json").write_text(json.dumps(benchmark, indent=1) + "\n", encoding="utf-8")
    trained = [emoji for emoji in emojis if emoji.split == "train"]
    write_jsonl(root / "warmup.jsonl", [_caption_record(emoji) for emoji in trained])
    heldout = [emoji for emoji in emojis if emoji.split == "heldout"]
    write_jsonl(root / "eval_heldout.jsonl", [_caption_record(e) | {"concept": e.concept} for e in heldout])
    # The source tells tasks apart where a step is to hold pairs of one task alone.
    records = {
        task.name: [pair_record(f"{task.name}-{i}", pair) | {"source": task.name} for i, pair in enumerate(task.train)]
        for task in tasks
    }
    write_jsonl(root / "bridge.jsonl", records["EmojiCaption_i2t"])
    write_jsonl(root / "contrastive.jsonl", [record for rows in records.values() for record in rows])


def _caption_record(emoji: Emoji) -> dict[str, str]:
    return {"id": f"{emoji.style}-{emoji.key}", "image_path": emoji.path, "caption": emoji.caption}


def _credits() -> list[str]:
    def line(package: Package) -> str:
        return f"{package.credit}. Licence: {package.licence}. Package: {package.name} {package.version}."

    return [line(package) for package in PACKAGES]


def _manifest(root: Path, tasks: Sequence[TaskRows], leaks: LeakReport, num_left_out: int) -> dict:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    texts = [path for path in files if path.suffix != ".png"]
    pictures = hashlib.sha256()
    for path in files:
        if path.suffix == ".png":
            pictures.update(f"{path.relative_to(root).as_posix()} {sha256_of(path)}\n".encode())
    return {
        "name": NAME,
        "packages": [package.as_json() for package in PACKAGES],
        "split_also_uses": CREDITS,
        "tasks": {
            task.name: {
                "meta_task": task.meta_task,
                "split": task.split,
                "eval_rows": len(task.eval_rows),
                "candidates": max(len(row.targets) for row in task.eval_rows),
                "train_rows": len(task.train),
            }
            for task in tasks
        },
        "emojis_left_out_of_both_parts": num_left_out,
        "leak_check": leaks.as_json(),
        "sha256": {path.relative_to(root).as_posix(): sha256_of(path) for path in texts},
        "pictures": {"count": len(files) - len(texts), "sha256": pictures.hexdigest()},
    }
