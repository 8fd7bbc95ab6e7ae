"""Writing a Megatron ``torch_dist`` checkpoint chunk by chunk, in one process, without holding it.

``dist_checkpointing.save`` needs every tensor at once. The format allows better: ``.distcp`` files hold tensors in
``torch.save``'s form back to back, and ``.metadata`` says for each chunk of each tensor in which file and where it
lies (torch.distributed.checkpoint, ``FileSystemWriter``). So a chunk is written as soon as it is there, and
``.metadata``, ``common.pt`` and ``metadata.json`` when all are. ``dist_checkpointing.load`` and
``torch.distributed.checkpoint`` read the result like their own, cut as they please.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_cocoa.checkpoint.info import OPTIMIZER_SHARDING
from megatron_cocoa.checkpoint.torch_dist_reader import BACKEND_FILE, METADATA_FILE

_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_FILE_BYTES = 4 * 2**30
CHUNK_BYTES = 64 * 2**20
"""Chunks are at most this large where rows allow: whoever loads a slice reads whole chunks."""


class TorchDistWriter:
    """Writes tensors into ``folder``, which exists; call ``finish`` when all are there.

    Args:
        folder: an empty folder.
        file_bytes: a new file is begun when one has reached this size.
    """

    def __init__(self, folder: Path, *, file_bytes: int = _FILE_BYTES) -> None:
        self.folder, self.file_bytes = folder, file_bytes
        self.num_bytes = 0
        self._file: io.BufferedWriter | None = None
        self._num_files = 0
        self._metadata = Metadata(state_dict_metadata={}, storage_data={}, storage_meta=StorageMeta())

    def __enter__(self) -> TorchDistWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, key: str, chunk: Tensor, *, shape: Sequence[int], offset: Sequence[int]) -> None:
        """Write one chunk of the tensor ``key``.

        Args:
            key: name in the checkpoint.
            chunk: on any device; dtype is the tensor's.
            shape: of the whole tensor.
            offset: of the chunk in it, as many numbers as ``chunk`` has dimensions.
        """
        entry = self._metadata.state_dict_metadata.get(key)
        if entry is None:
            entry = TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), torch.Size(shape), [])
            self._metadata.state_dict_metadata[key] = entry
        assert (entry.properties.dtype, tuple(entry.size)) == (chunk.dtype, tuple(shape)), f"{key} changed in between"
        index = MetadataIndex(key, offset)
        assert index not in self._metadata.storage_data, f"{key} came twice at {tuple(offset)}"
        chunk = chunk.detach().cpu().contiguous()
        if chunk.untyped_storage().nbytes() != chunk.nbytes:
            # torch.save writes the whole storage that a view looks into.
            chunk = chunk.clone()
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(chunk.shape)))
        self._metadata.storage_data[index] = self._append(chunk)
        self.num_bytes += chunk.nbytes

    def write_empty_state(self, key: str) -> None:
        """Write the ``_extra_state`` of a layer that has none: Megatron stores that fact too, and asks for it."""
        if key not in self._metadata.state_dict_metadata:
            self._metadata.state_dict_metadata[key] = BytesStorageMetadata()
            self._metadata.storage_data[MetadataIndex(key)] = self._append([None])

    def finish(self) -> None:
        """Write what makes the folder a checkpoint.

        Raises:
            ValueError: if chunks of a tensor are missing, with its name.
        """
        for key, entry in self._metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                found, needed = sum(chunk.sizes.numel() for chunk in entry.chunks), entry.size.numel()
                if found != needed:
                    raise ValueError(f"{key} of shape {tuple(entry.size)} received {found} of {needed} values")
        if self._file is not None:
            self._file.close()
        with open(self.folder / METADATA_FILE, "xb") as file:
            pickle.dump(self._metadata, file)
        torch.save({"content_metadata": {"distrib_optim_sharding_type": OPTIMIZER_SHARDING}}, self.folder / "common.pt")
        (self.folder / BACKEND_FILE).write_text(json.dumps(_BACKEND), encoding="utf-8")

    def _append(self, value: object) -> _StorageInfo:
        if self._file is None or self._file.tell() >= self.file_bytes:
            if self._file is not None:
                self._file.close()
            self._file = open(self.folder / f"__0_{self._num_files}.distcp", "xb")
            self._num_files += 1
        start = self._file.tell()
        with _without_checksums():
            torch.save(value, self._file)
        return _StorageInfo(Path(self._file.name).name, start, self._file.tell() - start)


@contextmanager
def _without_checksums() -> Iterator[None]:
    """``torch.load`` never looks at the checksums that ``torch.save`` adds, and they take half of its time."""
    if not hasattr(torch.serialization, "set_crc32_options"):
        yield
        return
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
