"""Files that are whole wherever they have their name."""

import pytest

from megatron_cocoa.atomic import write_atomically


@pytest.mark.parametrize("content", ["grüße \udcff\n", b"\x00\xff"], ids=["text", "bytes"])
def test_a_file_is_replaced_by_the_whole_of_the_new_one(tmp_path, content):
    """Claim: text (also what names of files spell outside of UTF-8) and bytes replace an older file, and nothing is
    left beside it, not even what a killed writer had left."""
    path = tmp_path / "settings.yaml"
    path.write_text("old")
    (tmp_path / ".settings.yaml.incomplete").write_text("half")
    write_atomically(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else "grüße ".encode() + b"\xff\n")
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    """Claim: a full disk does not cost what was there."""
    path = tmp_path / "settings.yaml"
    path.write_text("old")

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
