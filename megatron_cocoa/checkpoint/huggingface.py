"""Reading Hugging Face model folders: lazily, in both spellings, and with an account of every key on disk.

Tensors are read one at a time from safetensors files, so that memory does not grow with the model. Pickles are
refused. A folder that does not fit the name table exactly is an error before any tensor is used: each key is mapped,
or ignored for a stated reason, or named in the message.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from megatron_cocoa.checkpoint.bits import same_bits
from megatron_cocoa.checkpoint.mapping import NameTable, flat_spelling
from megatron_cocoa.checkpoint.placement import INCOMPLETE_SUFFIX
from megatron_cocoa.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from megatron_cocoa.checkpoint.tensor_mapping import Mapping

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_NAMES_SHOWN = 20
_OUTPUT, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class HuggingFaceReader:
    """The tensors of a Hugging Face model folder by their names in the flat spelling, whichever is on disk.

    Opening reads only the index and the headers. Close it with ``close`` or by using the reader as a context manager.

    Args:
        path: folder with ``model.safetensors``, or with ``model.safetensors.index.json`` and its shards.

    Raises:
        ValueError: if there are no safetensors, both forms, a damaged file, an index that leaves its folder or does
            not match its shards, one tensor under both spellings, or weights in FP8.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, SafetensorsFile] = {}
        self._location: dict[str, tuple[str, str]] = {}
        for file, names in _names_by_file(self.path).items():
            for name in self._check_shard(file, names):
                flat = flat_spelling(name)
                if flat in self._location:
                    raise ValueError(
                        f"{self.path} holds {flat} twice, as {self._location[flat][1]} in {self._location[flat][0]} "
                        f"and as {name} in {file}: remove one"
                    )
                self._location[flat] = (file, name)

    def __enter__(self) -> HuggingFaceReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the files. The reader can be used again afterwards."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def keys(self) -> list[str]:
        """Names in the flat spelling, in the order of the files."""
        return list(self._location)

    def get(self, name: str) -> Tensor:
        """The whole tensor on the CPU, in the dtype on disk and in memory of its own."""
        file, spelled = self._locate(name)
        return self._open(file).read(spelled)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading the tensor."""
        file, spelled = self._locate(name)
        return self._open(file).shape(spelled)

    def dtype(self, name: str) -> str:
        """Safetensors' word for the dtype on disk, such as ``BF16``, without reading the tensor."""
        file, spelled = self._locate(name)
        return self._open(file).dtype(spelled)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of all tensors on disk, without reading them."""
        return {DTYPES[self.dtype(name)] for name in self.keys()}

    def read(self, mapping: Mapping) -> Tensor:
        """The unsharded Megatron tensor of ``mapping``."""
        return mapping.merge([self.get(name) for name in mapping.hf_names])

    def _locate(self, name: str) -> tuple[str, str]:
        if name not in self._location:
            raise ValueError(f"{self.path} holds no tensor {name}")
        return self._location[name]

    def _open(self, file: str) -> SafetensorsFile:
        if file not in self._files:
            path = self.path / file
            if not path.is_file():
                raise ValueError(f"{path} does not exist, and {INDEX_FILE} names it: the folder is incomplete")
            self._files[file] = SafetensorsFile(path)
        return self._files[file]

    def _check_shard(self, file: str, names: set[str] | None) -> list[str]:
        """Names in a shard; they must be the ones that the index lists for it (``names``), where there is an index."""
        shard = self._open(file)
        found = shard.keys()
        quantized = [name for name in found if shard.dtype(name).startswith("F8_")]
        if quantized:
            raise ValueError(
                f"{self.path / file} holds {len(quantized)} tensor(s) quantized to FP8 (first: {quantized[0]}, "
                f"{shard.dtype(quantized[0])}), whose values count only together with scales: use the model that they "
                f"were made from, in BF16, F16 or F32"
            )
        if names is not None and names != set(found):
            raise ValueError(
                f"{self.path / file} does not match {INDEX_FILE}: "
                f"{_listed('missing from the file', names - set(found))}; "
                f"{_listed('not in the index', set(found) - names)}"
            )
        return found


def _names_by_file(path: Path) -> dict[str, set[str] | None]:
    """Weight files of a folder and the names that the index gives each; None where a single file needs no index."""
    if path.name.endswith(INCOMPLETE_SUFFIX):
        raise ValueError(f"{path} was left behind by a conversion that did not finish: delete it and convert again")
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: needed a Hugging Face model folder")
    single, index = (path / SINGLE_FILE).is_file(), (path / INDEX_FILE).is_file()
    if single and index:
        raise ValueError(f"{path} holds both {SINGLE_FILE} and {INDEX_FILE}: remove the one that is out of date")
    if single:
        return {SINGLE_FILE: None}
    if index:
        return _read_index(path / INDEX_FILE)
    refuse_adapters(path)
    pickles = sorted(entry.name for pattern in ("*.bin", "*.pt", "*.pth") for entry in path.glob(pattern))
    if pickles:
        raise ValueError(
            f"{path} holds {pickles[0]} but no safetensors. Pickles can run code when they are read and are refused: "
            f"where you trust the file, convert it with transformers, model = "
            f"AutoModelForImageTextToText.from_pretrained(path); model.save_pretrained(new_path)"
        )
    raise ValueError(f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def refuse_adapters(path: Path) -> None:
    """Tell whoever has a folder of adapters what to do with it.

    Raises:
        ValueError: if ``path`` holds adapters of peft.
    """
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} holds adapters of peft and not the model that they change, which its adapter_config.json names: "
            f"merge them, PeftModel.from_pretrained(model, path).merge_and_unload().save_pretrained(new_path), and put "
            f"the model's tokenizer and processor files there, too"
        )


def _read_index(path: Path) -> dict[str, set[str] | None]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        entries = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a safetensors index (JSON with a weight_map): {error!r}") from error
    files: dict[str, set[str] | None] = {}
    for name, file in entries:
        # The name alone is judged, not where it resolves to: the Hugging Face cache links shards to its blob store.
        plain = isinstance(file, str) and PurePosixPath(file).name == file and "\\" not in file
        if not plain or not file.endswith(".safetensors"):
            raise ValueError(f"{path} places {name} in {file!r}: needed the name of a .safetensors file beside it")
        files.setdefault(file, set()).add(name)
    return files


def _listed(what: str, names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)} {what}" + (": " + ", ".join(names[:_NAMES_SHOWN]) + more if names else "")


@dataclass(frozen=True)
class Coverage:
    """How the keys of a folder were accounted for, by name in the flat spelling.

    Args:
        mapped: keys that the name table uses.
        ignored: keys that it does not, each with the reason.
    """

    mapped: tuple[str, ...]
    ignored: dict[str, str]


def check_coverage(reader: HuggingFaceReader, table: NameTable) -> Coverage:
    """Account for every key of a folder against the name table, reading headers only (and a tied head's matrices).

    Raises:
        ValueError: naming up to twenty keys each that are unknown, missing, or of another shape (with the shape found
            and the one needed), or where a tied output layer differs from the embedding.
    """
    ignored = {}
    unknown = []
    for name in reader.keys():
        if name in table.hf_shapes:
            continue
        if name.endswith(".inv_freq"):
            ignored[name] = "rotary frequencies are recomputed from the configuration"
        elif name == _OUTPUT and table.tied:
            ignored[name] = "equal to the embedding, to which the configuration ties it"
        else:
            unknown.append(name)
    present = set(reader.keys())
    wrong = [
        f"{name} has {reader.shape(name)}, needed {shape}"
        for name, shape in table.hf_shapes.items()
        if name in present and reader.shape(name) != shape
    ]
    problems = {
        "key(s) that no mapping knows": unknown,
        "missing key(s)": set(table.hf_shapes) - present,
        "wrong shape(s)": wrong,
    }
    if any(problems.values()):
        found = "; ".join(_listed(what, names) for what, names in problems.items() if names)
        if problems["missing key(s)"] == {_OUTPUT}:
            found += (
                ". A model that was saved without its head needs one of the model that it was made from, or "
                "tie_word_embeddings true in config.json, with which the embedding serves in its place"
            )
        raise ValueError(f"{reader.path} does not fit its configuration. {found}")
    if _OUTPUT in ignored and not same_bits(reader.get(_OUTPUT), reader.get(_EMBEDDING)):
        raise ValueError(
            f"{reader.path} holds a {_OUTPUT} that differs from {_EMBEDDING}, but its configuration ties them: set "
            f"tie_word_embeddings to false (where it has it, in text_config as well), or remove {_OUTPUT}"
        )
    return Coverage(mapped=tuple(name for name in reader.keys() if name not in ignored), ignored=ignored)
