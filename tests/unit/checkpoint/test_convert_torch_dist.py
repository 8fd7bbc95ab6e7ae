"""The torch_dist format, written and read without Megatron: torch's own reader and writer are the reference."""

from __future__ import annotations

import enum
import io
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_cocoa.checkpoint.bits import same_bits
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.checkpoint.torch_dist_writer import TorchDistWriter

BACKEND = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'


def write_sample(folder, **options) -> dict[str, torch.Tensor]:
    """A stacked tensor in four chunks, one in a single chunk, an empty state."""
    folder.mkdir()
    tensors = {"stacked": torch.randn(2, 6, 3).bfloat16(), "single": torch.randn(5)}
    with TorchDistWriter(folder, **options) as writer:
        for layer in range(2):
            for row in (0, 4):
                chunk = tensors["stacked"][layer : layer + 1, row : row + 4]
                writer.write("stacked", chunk, shape=(2, 6, 3), offset=(layer, row, 0))
        writer.write("single", tensors["single"], shape=(5,), offset=(0,))
        writer.write_empty_state("layer._extra_state/shard_0_1")
        writer.finish()
    return tensors


@pytest.mark.parametrize("file_bytes", [2**32, 1])
def test_torch_reads_what_is_written(tmp_path, file_bytes):
    """torch.distributed.checkpoint loads every tensor, whole, bit for bit, from one file or from many."""
    tensors = write_sample(tmp_path / "c", file_bytes=file_bytes)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(loaded, checkpoint_id=tmp_path / "c", no_dist=True)
    assert all(same_bits(loaded[name], tensors[name]) for name in tensors)
    assert len(list((tmp_path / "c").glob("*.distcp"))) == (1 if file_bytes > 1 else 6)


def test_views_are_written_without_the_storage_around_them(tmp_path):
    """A chunk of one row of a large table takes the room of one row."""
    (tmp_path / "c").mkdir()
    with TorchDistWriter(tmp_path / "c") as writer:
        writer.write("row", torch.zeros(10_000, 16)[3:4], shape=(1, 16), offset=(0, 0))
        writer.finish()
    assert (tmp_path / "c" / "__0_0.distcp").stat().st_size < 10_000


def test_what_torch_writes_is_read(tmp_path):
    """Tensors, layers of tensors and dtypes of a checkpoint that torch's own writer made."""
    tensors = {"a": torch.randn(3, 4, 2), "b": torch.randn(7).bfloat16(), "empty": torch.zeros(0, 3)}
    dcp.save(tensors, checkpoint_id=tmp_path / "c", no_dist=True)
    (tmp_path / "c" / "metadata.json").write_text(BACKEND)
    with TorchDistReader(tmp_path / "c") as reader:
        assert set(reader.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert reader.shape(name) == tuple(tensor.shape) and reader.dtype(name) == tensor.dtype
            assert same_bits(reader.read(name), tensor)
        assert all(same_bits(reader.read("a", layer=layer), tensors["a"][layer]) for layer in range(3))


def test_chunks_are_put_together(tmp_path):
    """Whole tensors and single layers come out of chunks cut in any dimension."""
    tensors = write_sample(tmp_path / "c")
    with TorchDistReader(tmp_path / "c") as reader:
        assert same_bits(reader.read("stacked"), tensors["stacked"])
        assert same_bits(reader.read("stacked", layer=1), tensors["stacked"][1])
        assert same_bits(reader.read("single"), tensors["single"])
        with pytest.raises(ValueError, match="holds no tensor other"):
            reader.read("other")


def test_a_chunk_that_the_system_gives_in_pieces_is_read(tmp_path, monkeypatch):
    """Linux gives 2 GiB at once at most, less than the embedding of a 7B in FP32, which Megatron keeps in one chunk."""
    tensors = write_sample(tmp_path / "c")
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:7]], offset))
    with TorchDistReader(tmp_path / "c") as reader:
        assert all(same_bits(reader.read(name), tensor) for name, tensor in tensors.items())


def test_a_missing_chunk_is_found_by_writer_and_reader(tmp_path):
    """A tensor with a hole never becomes a checkpoint, and one that lies on disk is not read."""
    tensors = write_sample(tmp_path / "c")
    (tmp_path / "d").mkdir()
    with TorchDistWriter(tmp_path / "d") as writer:
        writer.write("stacked", tensors["stacked"][:1], shape=(2, 6, 3), offset=(0, 0, 0))
        with pytest.raises(ValueError, match=r"stacked of shape \(2, 6, 3\) received 18 of 36 values"):
            writer.finish()
    assert not (tmp_path / "d" / ".metadata").exists()
    content = pickle.loads((tmp_path / "c" / ".metadata").read_bytes())
    content.state_dict_metadata["stacked"].chunks.pop()
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="stacked in .* has chunks for 12 of 18 values"):
        TorchDistReader(tmp_path / "c").read("stacked", layer=1)


class _OldPickler(pickle.Pickler):
    """Pickles members of enumerations as Python 3.11.0 to 3.11.3 does."""

    def reducer_override(self, obj):
        return (getattr, (type(obj), obj.name)) if isinstance(obj, enum.Enum) else NotImplemented


def test_metadata_of_an_older_python_is_read(tmp_path):
    """Members of enumerations may have been pickled as attributes, of planners' own enumerations too."""
    tensors = {"a": torch.randn(3, 4)}
    dcp.save(tensors, checkpoint_id=tmp_path / "c", no_dist=True)
    (tmp_path / "c" / "metadata.json").write_text(BACKEND)
    content = pickle.loads((tmp_path / "c" / ".metadata").read_bytes())
    content.planner_data = {"kind": WriteItemType.TENSOR}
    with (tmp_path / "c" / ".metadata").open("wb") as file:
        _OldPickler(file).dump(content)
    assert b"getattr" in (tmp_path / "c" / ".metadata").read_bytes()
    with TorchDistReader(tmp_path / "c") as reader:
        assert same_bits(reader.read("a"), tensors["a"])


class Attribute:
    def __reduce__(self):
        return getattr, (torch.Size, "__subclasses__")


def test_attributes_of_anything_but_an_enumeration_are_refused(tmp_path):
    """What an older Python needs opens no way from known classes to other code."""
    write_sample(tmp_path / "c")
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(Attribute()))
    with pytest.raises(ValueError, match="takes '__subclasses__' from <class 'torch.Size'>, which is no enumeration"):
        TorchDistReader(tmp_path / "c")


class Harmful:
    def __reduce__(self):
        return os.mkdir, (os.environ["HARM"],)


class TorchFunction:
    def __reduce__(self):
        return torch.get_default_device, ()


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize(("harmful", "name"), [(Harmful, "posix.mkdir"), (TorchFunction, "torch.get_default_device")])
def test_metadata_that_runs_code_is_refused_unrun(tmp_path, monkeypatch, harmful, name, wrap):
    """A pickle that is not a checkpoint's metadata is named and never executed, alone or inside of real metadata."""
    write_sample(tmp_path / "c")
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    content = Metadata({"x": BytesStorageMetadata()}, planner_data=harmful()) if wrap else harmful()
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=f"names {name}, which has no place in a checkpoint's metadata"):
        TorchDistReader(tmp_path / "c")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"a": 1})])
def test_damaged_metadata_is_refused(tmp_path, content):
    """Empty, random and foreign bytes end in one message."""
    write_sample(tmp_path / "c")
    (tmp_path / "c" / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint's metadata|needed a checkpoint's Metadata"):
        TorchDistReader(tmp_path / "c")


def test_a_chunk_that_runs_code_or_is_damaged_is_refused(tmp_path, monkeypatch):
    """Chunks are read as weights alone; damaged bytes and objects of another kind are named with their place."""
    write_sample(tmp_path / "c")
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    content = pickle.loads((tmp_path / "c" / ".metadata").read_bytes())
    place = next(info for index, info in content.storage_data.items() if index.fqn == "single")
    file = tmp_path / "c" / place.relative_path
    original = file.read_bytes()

    def overwrite(payload: bytes) -> None:
        assert len(payload) <= place.length
        before, after = original[: place.offset], original[place.offset + place.length :]
        file.write_bytes(before + payload.ljust(place.length) + after)

    for payload in (b"\0" * 100, pickle.dumps(Harmful())):
        overwrite(payload)
        with pytest.raises(ValueError, match=f"single in .* at byte {place.offset} cannot be read as a tensor"):
            TorchDistReader(tmp_path / "c").read("single")
    assert not (tmp_path / "harm").exists()
    other = io.BytesIO()
    torch.save(torch.zeros(5, dtype=torch.int32), other)
    overwrite(other.getvalue())
    with pytest.raises(ValueError, match=r"single in .* is \(\(5,\), torch.int32\), needed \(\(5,\), torch.float32\)"):
        TorchDistReader(tmp_path / "c").read("single")


@pytest.mark.parametrize("name", ["../x.distcp", "/etc/x.distcp", "x.txt"])
def test_metadata_that_leaves_its_folder_is_refused(tmp_path, name):
    """Metadata is data from elsewhere: it may only name .distcp files beside itself."""
    write_sample(tmp_path / "c")
    content = pickle.loads((tmp_path / "c" / ".metadata").read_bytes())
    for info in content.storage_data.values():
        info.relative_path = name
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="needed a .distcp file beside it"):
        TorchDistReader(tmp_path / "c")


def test_incomplete_folders_are_refused(tmp_path):
    """A missing part, a short file, an absent file, a folder that was being written: each is told at opening."""
    write_sample(tmp_path / "c")
    file = tmp_path / "c" / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 2000)
    with pytest.raises(ValueError, match="it may be truncated, copy it again"):
        TorchDistReader(tmp_path / "c")
    file.unlink()
    with pytest.raises(ValueError, match="__0_0.distcp does not exist, and .metadata names it"):
        TorchDistReader(tmp_path / "c")
    (tmp_path / "c" / "metadata.json").unlink()
    with pytest.raises(ValueError, match="is incomplete or no torch_dist checkpoint"):
        TorchDistReader(tmp_path / "c")
    with pytest.raises(ValueError, match="does not exist: needed a folder"):
        TorchDistReader(tmp_path / "absent")
    write_sample(tmp_path / ".d.1.incomplete")
    with pytest.raises(ValueError, match="left behind by a writer that did not finish"):
        TorchDistReader(tmp_path / ".d.1.incomplete")
