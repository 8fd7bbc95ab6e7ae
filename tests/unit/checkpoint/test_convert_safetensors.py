"""Reading safetensors into memory of our own: the package is the reference, and no header is taken on trust."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from megatron_cocoa.checkpoint.bits import same_bits
from megatron_cocoa.checkpoint.safetensors_file import SafetensorsFile


def write_header(path, header, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(**changes) -> dict:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


def test_every_dtype_reads_as_the_package_wrote_it(tmp_path):
    """Shapes, dtypes and bits of scalars, empty and large tensors, floats and integers."""
    tensors = {str(d): torch.arange(12).reshape(3, 4).to(d) for d in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool
    )}  # fmt: skip
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "f", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "f")
    assert set(file.keys()) == set(tensors)
    assert all(same_bits(file.read(name), tensor) for name, tensor in tensors.items())
    file.close()


@pytest.mark.parametrize(
    "header, message",
    [
        (b"{", "damaged"),
        (b"[]", "damaged"),
        (b'"text"', "damaged"),
        (b"[" * 100_000, "damaged"),
        ({"a": 3}, "damaged"),
        (entry(dtype="F4"), "a has dtype F4"),
        (entry(dtype=["F32"]), "damaged"),
        (entry(shape=[-2]), r"a has shape \[-2\]"),
        (entry(shape=[3]), "takes 12 bytes, the header gives it 8"),
        (entry(data_offsets=[0, 8, 9]), "damaged"),
        (entry(data_offsets=[4, 12]), "begins at byte 4 of the data, needed 0"),
        (entry() | {"b": entry()["a"]}, "begins at byte 0 of the data, needed 8"),
        (b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"a":{}}', "names a tensor twice"),
        ({}, "the header announces"),
        (entry(dtype="U8", shape=[2**62], data_offsets=[0, 2**62]), "the header announces"),
    ],
)
def test_damaged_headers_are_refused(tmp_path, header, message):
    """Whatever a header claims, the file is refused before a tensor is read, with the reason and the file's size."""
    write_header(tmp_path / "f", header, bytes(8))
    with pytest.raises(ValueError, match=message) as error:
        SafetensorsFile(tmp_path / "f")
    assert f"({(tmp_path / 'f').stat().st_size} bytes) is not a readable safetensors file" in str(error.value)


def test_a_tensor_that_the_system_gives_in_pieces_is_read(tmp_path, monkeypatch):
    """Linux gives 2 GiB at once at most, less than the embedding of a 7B in FP32."""
    tensors = {"a": torch.randn(30), "b": torch.arange(5)}
    save_file(tensors, tmp_path / "f")
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:7]], offset))
    file = SafetensorsFile(tmp_path / "f")
    assert all(same_bits(file.read(name), tensor) for name, tensor in tensors.items())
    file.close()


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    """Short reads never become zeros."""
    save_file({"a": torch.zeros(1000)}, tmp_path / "f")
    file = SafetensorsFile(tmp_path / "f")
    (tmp_path / "f").open("r+b").truncate(200)
    with pytest.raises(ValueError, match="a in .* cannot be read: the file ends at byte 200, .* bytes too early"):
        file.read("a")
    file.close()
