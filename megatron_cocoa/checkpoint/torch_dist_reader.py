"""Reading a Megatron ``torch_dist`` checkpoint tensor by tensor, in one process, without Megatron.

``.metadata`` is a pickle, and a pickle can run code: it is read by an unpickler that knows the handful of plain
data classes that belong there and refuses everything else. Chunks are ``torch.save``'s form and are read with
``weights_only``.
"""

from __future__ import annotations

import enum
import io
import os
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from megatron_cocoa.checkpoint.placement import INCOMPLETE_SUFFIX
from megatron_cocoa.checkpoint.positioned_read import read_into

METADATA_FILE = ".metadata"
BACKEND_FILE = "metadata.json"
"""What Megatron writes last."""

_UNUSED_MODULES = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.", "pathlib")
_KNOWN: dict[tuple[str, str], Any] = {
    **{
        (cls.__module__, cls.__qualname__): cls
        for cls in (
            metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta, metadata.TensorStorageMetadata,
            metadata.BytesStorageMetadata, metadata.ChunkStorageMetadata, metadata.TensorProperties,
            metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo,
        )
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}  # fmt: skip


class _Unused:
    """Stands for a planner's plan or the writer's path: neither is needed, and no code of theirs runs."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _enum_member(enumeration: Any, name: str) -> Any:
    """A member by its name: Python 3.11.0 to 3.11.3 pickles it as ``getattr(enumeration, name)``."""
    if enumeration is _Unused:
        return _Unused()
    if isinstance(enumeration, enum.EnumType):
        return enumeration[name]
    raise pickle.UnpicklingError(f"it takes {name!r} from {enumeration!r}, which is no enumeration")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith(_UNUSED_MODULES):
            return _Unused
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in a checkpoint's metadata")


class _Slice(io.RawIOBase):
    """The bytes ``[start, start + length)`` of an open file, as a file.

    ``failure`` keeps the operating system's error: torch's reader turns it into another one without its reason.
    """

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self.descriptor, self.start, self.length, self.position = descriptor, start, length, 0
        self.failure: OSError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self.length - self.position)]
        try:
            # Whole: torch's reader takes fewer bytes than it asked for as damage.
            count = read_into(self.descriptor, view, self.start + self.position)
        except OSError as error:
            self.failure = error
            raise
        self.position += count
        return count


class _Chunk(NamedTuple):
    offset: tuple[int, ...]
    size: tuple[int, ...]
    file: str
    start: int
    length: int


class TorchDistReader:
    """The tensors of a checkpoint by their keys. Opening reads ``.metadata`` alone.

    Args:
        path: a complete checkpoint.

    Raises:
        ValueError: if the folder is no complete ``torch_dist`` checkpoint, its metadata is damaged or could run
            code, or a file that it names is missing or too short.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content = _read_metadata(self.path)
        sizes: dict[str, int] = {}
        self._states: list[str] = []
        self._entries: dict[str, metadata.TensorStorageMetadata] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        try:
            for key, entry in content.state_dict_metadata.items():
                if isinstance(entry, metadata.TensorStorageMetadata):
                    self._entries[key] = entry
                    self._chunks[key] = [self._locate(key, chunk, content, sizes) for chunk in entry.chunks]
                else:
                    self._states.append(key)
        except (AttributeError, TypeError, KeyError) as error:
            raise ValueError(f"{self.path / METADATA_FILE} is damaged: {error!r}") from error
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> TorchDistReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def keys(self) -> list[str]:
        """Keys of all tensors, optimizer state included."""
        return list(self._entries)

    def state_keys(self) -> list[str]:
        """Keys of what is no tensor, such as the empty ``_extra_state`` of a layer."""
        return self._states

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._entries[key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self._entries[key].properties.dtype

    def read(self, key: str, *, layer: int | None = None) -> Tensor:
        """A whole tensor, or entry ``layer`` of its first dimension, without that dimension.

        Raises:
            ValueError: if a chunk is damaged, is no plain tensor, or chunks are missing.
        """
        if key not in self._entries:
            raise ValueError(f"{self.path} holds no tensor {key}")
        shape = self.shape(key)
        first = (0,) * len(shape) if layer is None else (layer, *(0,) * (len(shape) - 1))
        size = shape if layer is None else (1, *shape[1:])
        whole: Tensor | None = None
        filled = 0
        for chunk in self._chunks[key]:
            overlap = _overlap(first, size, chunk)
            if overlap is None:
                continue
            part = _region(self._read_chunk(key, chunk), overlap, origin=chunk.offset)
            filled += part.numel()
            if tuple(part.shape) == tuple(size):
                whole = part
                continue
            if whole is None:
                whole = torch.empty(size, dtype=self.dtype(key))
            _region(whole, overlap, origin=first).copy_(part)
        if filled != torch.Size(size).numel():
            raise ValueError(f"{key} in {self.path} has chunks for {filled} of {torch.Size(size).numel()} values")
        whole = torch.empty(size, dtype=self.dtype(key)) if whole is None else whole
        return whole if layer is None else whole[0]

    def _locate(self, key: str, chunk: Any, content: metadata.Metadata, sizes: dict[str, int]) -> _Chunk:
        info = content.storage_data[metadata.MetadataIndex(key, chunk.offsets)]
        name = info.relative_path
        if Path(name).name != name or not name.endswith(".distcp"):
            raise ValueError(f"{self.path / METADATA_FILE} places {key} in {name!r}: needed a .distcp file beside it")
        if name not in sizes:
            file = self.path / name
            if not file.is_file():
                raise ValueError(f"{file} does not exist, and {METADATA_FILE} names it: the checkpoint is incomplete")
            sizes[name] = file.stat().st_size
        if not 0 <= info.offset <= info.offset + info.length <= sizes[name]:
            raise ValueError(
                f"{self.path / name} has {sizes[name]} bytes, {key} lies at {info.offset} to "
                f"{info.offset + info.length}: it may be truncated, copy it again"
            )
        return _Chunk(tuple(chunk.offsets), tuple(chunk.sizes), name, info.offset, info.length)

    def _read_chunk(self, key: str, chunk: _Chunk) -> Tensor:
        where = f"{key} in {self.path / chunk.file} at byte {chunk.start}"
        file = None
        try:
            if chunk.file not in self._descriptors:
                self._descriptors[chunk.file] = os.open(self.path / chunk.file, os.O_RDONLY)
            file = _Slice(self._descriptors[chunk.file], chunk.start, chunk.length)
            tensor = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, AttributeError, pickle.UnpicklingError) as error:
            cause = error if file is None or file.failure is None else file.failure
            reason = str(cause).splitlines()[0] if str(cause) else repr(cause)
            raise ValueError(f"{where} cannot be read as a tensor: {reason}") from error
        found = (tuple(tensor.shape), tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        if found != (chunk.size, self.dtype(key)):
            raise ValueError(f"{where} is {found}, needed {(chunk.size, self.dtype(key))}")
        return tensor.detach()


def _overlap(first: tuple[int, ...], size: tuple[int, ...], chunk: _Chunk) -> list[tuple[int, int]] | None:
    """Where a region and a chunk meet, as begin and end of each dimension; None where they do not."""
    spans = [
        (max(a, b), min(a + n, b + m)) for a, n, b, m in zip(first, size, chunk.offset, chunk.size, strict=True)
    ]
    return spans if all(begin < end for begin, end in spans) else None


def _region(tensor: Tensor, spans: list[tuple[int, int]], *, origin: tuple[int, ...]) -> Tensor:
    """The view of ``tensor``, whose first entry lies at ``origin``, that ``spans`` describe."""
    for dim, ((begin, end), start) in enumerate(zip(spans, origin, strict=True)):
        tensor = tensor.narrow(dim, begin - start, end - begin)
    return tensor


def _read_metadata(path: Path) -> metadata.Metadata:
    if path.name.endswith(INCOMPLETE_SUFFIX):
        raise ValueError(f"{path} was left behind by a writer that did not finish: delete it and write again")
    if not (path / METADATA_FILE).is_file() or not (path / BACKEND_FILE).is_file():
        state = "is incomplete or no torch_dist checkpoint" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {state}: needed a folder with {METADATA_FILE} and {BACKEND_FILE}")
    try:
        with open(path / METADATA_FILE, "rb") as file:
            content = _MetadataUnpickler(file).load()
    except Exception as error:  # noqa: BLE001  a damaged pickle ends in nearly any exception
        raise ValueError(f"{path / METADATA_FILE} cannot be read as a checkpoint's metadata: {error}") from error
    if not isinstance(content, metadata.Metadata):
        raise ValueError(f"{path / METADATA_FILE} holds {type(content).__name__}, needed a checkpoint's Metadata")
    return content
