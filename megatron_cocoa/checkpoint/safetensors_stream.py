"""Writing a safetensors file tensor by tensor, so that memory holds one tensor rather than one file.

The ``safetensors`` package serialises a finished dictionary. The format allows better: an 8-byte little-endian length,
a JSON header (which may end in spaces) and the tensors' bytes back to back. Room for the header is reserved from the
names and shapes, the tensors follow as they come, and the header is written last: a file whose writer was killed
begins with zeros and no reader accepts it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_WIDEST_ITEM = 8
_LONGEST_DTYPE = "BF16"


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write ``tensors`` in the order in which they come and force them to disk.

    Args:
        path: file to create.
        tensors: names and floating-point tensors on any device.
        shapes: the names and shapes that will come, in that order.
        metadata: goes into the header.

    Returns:
        Bytes of tensor data.

    Raises:
        ValueError: if a name, its place in the order or its shape is not as announced, or a dtype is not floating.
    """
    widest = sum(torch.Size(shape).numel() for shape in shapes.values()) * _WIDEST_ITEM
    metadata = metadata or {}
    room = len(_header({name: (_LONGEST_DTYPE, shape, (widest, widest)) for name, shape in shapes.items()}, metadata))
    room = -(-room // 8) * 8
    entries: dict[str, tuple[str, tuple[int, ...], tuple[int, int]]] = {}
    position, expected = 0, iter(shapes.items())
    with open(path, "xb") as file:
        file.write(bytes(8 + room))
        for name, tensor in tensors:
            if (name, tuple(tensor.shape)) != next(expected, None):
                raise ValueError(f"{name} of shape {tuple(tensor.shape)} was not announced for this place in {path}")
            if tensor.dtype not in _DTYPES:
                raise ValueError(f"{name} has dtype {tensor.dtype}, needed one of {', '.join(map(str, _DTYPES))}")
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            file.write(memoryview(data))
            entries[name] = (_DTYPES[tensor.dtype], tuple(tensor.shape), (position, position + data.nbytes))
            position += data.nbytes
        if len(entries) != len(shapes):
            raise ValueError(f"{len(shapes)} tensors were announced for {path}, {len(entries)} came")
        file.seek(0)
        file.write(room.to_bytes(8, "little") + _header(entries, metadata).ljust(room))
        file.flush()
        os.fsync(file.fileno())
    return position


def _header(entries: Mapping[str, tuple[str, tuple[int, ...], tuple[int, int]]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    for name, (dtype, shape, offsets) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return json.dumps(header, separators=(",", ":")).encode()
