"""Writing files: whole or not at all."""

import os

import pytest

from cobra import storage


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk-full", "killed"])
def test_broken_write_leaves_the_old_file(tmp_path, monkeypatch, call, error):
    """A write that ends in the middle leaves the file before it whole, and nothing beside it."""
    path = tmp_path / "scores.safetensors"
    storage.write_bytes(path, b"old")

    def fail(*args):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        storage.write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
