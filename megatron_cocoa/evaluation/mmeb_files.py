"""What an evaluation leaves on disk: a score file and the predictions of each task, written whole or not at all.

``{task}_score.json`` and ``{task}_pred.txt`` have the names and the leading keys of the VLM2Vec evaluation, so that
scripts that compare runs read both. Beside ``acc``, ``num_correct`` and ``num_pred`` a score file holds everything
that moves a score: settings, model, data and versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cocoa.atomic import write_atomically
from megatron_cocoa.data.checksums import sha256_of

SCORE_SUFFIX = "_score.json"
PREDICTIONS_SUFFIX = "_pred.txt"
EVIDENCE_SUFFIX = "_evidence.json"

_DOWNLOAD_FOLDERS = (".cache", ".git")

IDENTITY_KEYS = ("settings", "model", "data", "benchmark")
"""Parts of a score file that must be equal for it to be kept when an evaluation goes on."""

TABLE_KEYS = ("settings", "model", "benchmark")
"""Parts that must be equal for score files to stand in one table."""


@dataclass(frozen=True)
class Identity:
    """What a score depends on, as JSON values.

    Args:
        settings: how things are embedded and compared.
        model: what the weights are.
        benchmark: ``Benchmark.to_json()``.
    """

    settings: dict[str, Any]
    model: dict[str, Any]
    benchmark: dict[str, Any]

    def of_task(self, data: dict[str, Any]) -> dict[str, Any]:
        """The parts of a score file under ``IDENTITY_KEYS``; ``data`` says what the rows and pictures are."""
        return {
            "settings": self.settings,
            "model": self.model,
            "data": data,
            "benchmark": self.benchmark,
        }


def read_score(file: Path) -> dict[str, Any]:
    """A score file's content.

    Raises:
        ValueError: if it is no JSON object with ``acc``, ``num_correct`` and ``num_pred`` that agree.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}): remove it and evaluate the task again") from error
    try:
        acc, correct, total = content["acc"], content["num_correct"], content["num_pred"]
        agrees = total > 0 and 0 <= correct <= total and abs(acc - correct / total) < 1e-9
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} lacks acc, num_correct or num_pred: it is no score file") from error
    if not agrees:
        raise ValueError(f"{file} says acc {acc} for {correct} of {total}: it is damaged, evaluate the task again")
    return content


def is_scored(output: Path, task: str, wanted: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether a task's score file is there and holds for what is wanted.

    Args:
        output: folder of the score files.
        task: name.
        wanted: ``Identity.of_task``.
        overwrite: score again what was scored under something else.

    Raises:
        ValueError: naming what differs, if the file holds for something else and may not be overwritten.
    """
    file = output / f"{task}{SCORE_SUFFIX}"
    if not file.is_file():
        return False
    try:
        found = read_score(file)
    except ValueError:
        if overwrite:
            return False
        raise
    differing = [difference for key in IDENTITY_KEYS for difference in _differences(found.get(key), wanted[key], key)]
    if differing and not overwrite:
        raise ValueError(
            f"{file} was made with another {'; '.join(differing)}: name another output folder, or pass --overwrite"
        )
    return not differing


def check_others(output: Path, tasks: Collection[str], identity: Identity) -> None:
    """Refuse a folder whose scores of other tasks cannot stand in one table with those that are to come.

    Args:
        output: folder of the score files.
        tasks: names of those that are to be scored.
        identity: of the evaluation.

    Raises:
        ValueError: naming the first such file and what differs; or if ``output`` is no folder.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: name a folder for the scores")
    wanted = identity.of_task({})
    for file in sorted(output.glob(f"*{SCORE_SUFFIX}")):
        if file.name.removesuffix(SCORE_SUFFIX) in tasks:
            continue
        found = read_score(file)
        differing = [d for key in TABLE_KEYS for d in _differences(found.get(key), wanted[key], key)]
        if differing:
            raise ValueError(
                f"{file}, a task that is not scored now, was made with another {'; '.join(differing)}: name another "
                f"output folder, or remove the file"
            )


def _differences(found: Any, wanted: Any, name: str) -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [*wanted, *(key for key in found if key not in wanted)]
        return [d for key in keys for d in _differences(found.get(key), wanted.get(key), f"{name}.{key}")]
    # Compared as JSON, where a tuple is a list.
    return [] if json.dumps(found) == json.dumps(wanted) else [f"{name} (was {found!r}, is now {wanted!r})"]


def write_task(
    output: Path, task: str, *, score: dict[str, Any], predictions: Sequence[tuple[str, str]], evidence: dict[str, Any]
) -> None:
    """Write a task's files, the score file last: where it stands, the others stand, too."""
    output.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{(str(text), str(path))}\n" for text, path in predictions)
    write_atomically(output / f"{task}{PREDICTIONS_SUFFIX}", lines)
    write_atomically(output / f"{task}{EVIDENCE_SUFFIX}", json.dumps(evidence, ensure_ascii=False) + "\n")
    write_atomically(output / f"{task}{SCORE_SUFFIX}", json.dumps(score, indent=2, ensure_ascii=False) + "\n")


def folder_sha256(folder: str | Path) -> str:
    """A hash over the names and contents of all files in a model folder, which does not depend on where it stands.

    What a download leaves beside a model is none of it: ``hf download`` and git note times there.

    Raises:
        ValueError: if it is not a folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: needed a Hugging Face folder or a Megatron checkpoint")
    digest = hashlib.sha256()
    files = (path for path in root.rglob("*") if path.is_file())
    for file in sorted(file for file in files if file.relative_to(root).parts[0] not in _DOWNLOAD_FOLDERS):
        digest.update(f"{file.relative_to(root).as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()
