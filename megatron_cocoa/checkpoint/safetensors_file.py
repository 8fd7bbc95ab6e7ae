"""Reading a safetensors file tensor by tensor into memory of our own.

The ``safetensors`` package maps the file, and mapped pages count as resident: reading a model through it peaks at the
size of a shard. Here only the header is kept and each tensor is read into a buffer. The header comes from elsewhere
and is checked as a whole before any tensor is read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cocoa.checkpoint.positioned_read import read_into

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """An open file; close it with ``close``. ``metadata`` is what its header says beyond the tensors.

    Raises:
        ValueError: if the file is truncated or damaged, saying how.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        self.metadata: dict[str, str] = {}
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            self.size = os.fstat(self._descriptor).st_size
            self._start, self._entries = self._read_header()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.close()
            size = path.stat().st_size
            raise ValueError(
                f"{path} ({size} bytes) is not a readable safetensors file, it may be truncated or damaged: {error}. "
                f"Copy it again"
            ) from error

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def keys(self) -> list[str]:
        """Names, in the order of the header."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """Safetensors' word for it, such as ``BF16``."""
        return self._entries[name].dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor, in memory of its own.

        Raises:
            ValueError: if the disk cannot give its bytes.
        """
        entry = self._entries[name]
        data = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        try:
            self._read_into(memoryview(data.numpy()), self._start + entry.begin)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} in {self.path} cannot be read: {error}") from error
        return data.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def _read_into(self, buffer: memoryview, position: int) -> None:
        done = read_into(self._descriptor, buffer, position)
        if done < len(buffer):
            raise ValueError(f"the file ends at byte {position + done}, {len(buffer) - done} bytes too early")

    def _read_header(self) -> tuple[int, dict[str, _Entry]]:
        prefix = os.pread(self._descriptor, 8, 0)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= min(_LONGEST_HEADER, self.size - 8):
            raise ValueError(f"a header of {length} bytes does not fit")
        text = bytearray(length)
        self._read_into(memoryview(text), 8)
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        self.metadata = dict(header.pop("__metadata__", None) or {})
        entries = {name: _parse(name, value) for name, value in header.items()}
        position = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != position:
                raise ValueError(f"{name} begins at byte {entry.begin} of the data, needed {position}")
            position = entry.end
        if 8 + length + position != self.size:
            raise ValueError(f"the header announces {8 + length + position} bytes")
        return 8 + length, entries


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("the header names a tensor twice")
    return found


def _parse(name: str, value: dict) -> _Entry:
    shape, (begin, end) = value["shape"], value["data_offsets"]
    if value["dtype"] not in DTYPES:
        raise ValueError(f"{name} has dtype {value['dtype']}, needed one of {', '.join(DTYPES)}")
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name} has shape {shape} at bytes {begin} to {end}")
    size = torch.Size(shape).numel() * DTYPES[value["dtype"]].itemsize
    if end - begin != size:
        raise ValueError(f"{name} of shape {shape} takes {size} bytes, the header gives it {end - begin}")
    return _Entry(value["dtype"], tuple(shape), begin, end)
