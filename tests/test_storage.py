"""Writing files: whole or not at all."""

import os
from functools import partial

import pytest
from models import Mlp, Partial, mlp_batch

import cobra
from cobra import LayerScores

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")

calibrate = partial(cobra.calibrate, steps=3, progress=False)


@pytest.fixture
def scores() -> LayerScores:
    with pytest.warns(UserWarning, match="no score"):
        return calibrate(Partial(), [mlp_batch()])


@pytest.fixture
def file(scores, tmp_path):
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    return path


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk-full", "killed"])
def test_broken_write_leaves_the_old_file(scores, file, monkeypatch, call, error):
    """A save that ends in the middle leaves the file before it whole, and nothing beside it."""
    before = file.read_bytes()

    def fail(*args):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        calibrate(Mlp(), [mlp_batch()]).save(file)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]
    assert LayerScores.load(file).sites == scores.sites
