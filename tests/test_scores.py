"""Layer scores on disk and in print: every field comes back, and a file of anything else is refused by name."""

import json
import re
from functools import partial

import pytest
import torch
from models import Mlp, Partial, minilm, mlp_batch, review_batch
from safetensors.torch import save_file

import cobra
from cobra import FormatError, LayerScores, storage
from cobra.scores import KIND

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


@pytest.fixture
def site_scores() -> LayerScores:
    return calibrate(minilm(), [review_batch()])


def test_round_trip(scores, tmp_path):
    """Every field comes back equal, from a folder that save made."""
    path = tmp_path / "new" / "scores.safetensors"
    scores.save(str(path))
    found = LayerScores.load(path)
    for name in ("conductance", "gradient", "attributions", "gradient_norms"):
        assert torch.equal(getattr(found, name), getattr(scores, name))
    for name in ("sites", "members", "completeness", "unused", "settings", "fingerprint"):
        assert getattr(found, name) == getattr(scores, name), name
    assert repr(found) == repr(scores)


def test_gradient_norms(scores):
    """Those of single examples, whose root mean square is the gradient."""
    assert scores.gradient_norms.shape == scores.attributions.shape
    torch.testing.assert_close(scores.gradient_norms.square().mean(0).sqrt(), scores.gradient)


def test_file_without_gradient_norms(file):
    """As releases before wrote it: everything else is there."""
    tensors, meta = storage.read_tensors(file, KIND)
    del tensors["gradient_norms"]
    storage.write_tensors(file, tensors, KIND, {k: v for k, v in meta.items() if k != "kind"})
    found = LayerScores.load(file)
    assert found.gradient_norms is None and torch.equal(found.gradient, tensors["gradient"])
    found.save(file)
    assert LayerScores.load(file).gradient_norms is None


def test_dataframe(scores):
    """One row a layer, best read sorted by prior."""
    frame = scores.to_dataframe()
    assert list(frame.columns) == ["site", "conductance", "gradient", "prior"]
    assert frame["site"].tolist() == ["up", "mid"]
    assert frame["prior"].sum() == pytest.approx(1)
    assert frame["gradient"].tolist() == scores.gradient.tolist()


def test_repr(site_scores):
    text = r"LayerScores\(37 sites, paper over 3 midpoint points, 4 examples, correlation -?\d\.\d\d, path residual [\d.]+%\)"
    assert re.fullmatch(text, repr(site_scores))


@pytest.mark.filterwarnings("error")
def test_repr_of_a_single_group():
    """One group has no correlation; printing it is no reason to warn."""
    assert "correlation nan" in repr(calibrate(Mlp(), [mlp_batch()], target_modules=("up",)))


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -100, -1])
def test_truncated_file(file, length):
    """A copy that broke off at any length is refused by name, not read half."""
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(FormatError, match=r"scores\.safetensors: expected a COBRA layer scores .*truncated or foreign"):
        LayerScores.load(file)


def rewrite(file, tensors=None, kind=KIND, **meta):
    """The file with some of its content replaced; a field given as None is gone."""
    old_tensors, old_meta = storage.read_tensors(file, KIND)
    meta = {k: v for k, v in {**old_meta, **meta}.items() if k != "kind" and v is not None}
    storage.write_tensors(file, {**old_tensors, **(tensors or {})}, kind, meta)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: save_file({"weight": torch.ones(2)}, f), "found a file of another program"),
        (lambda f: f.write_text(json.dumps({"kind": KIND, "version": 1})), "truncated or foreign file"),
        (lambda f: f.write_bytes(b"PK\x03\x04" + bytes(200)), "truncated or foreign file"),
        (lambda f: rewrite(f, kind="checkpoint"), "expected a COBRA layer scores, found checkpoint"),
        (lambda f: rewrite(f, version=2), "version 2 of a COBRA layer scores; this release reads version 1"),
        (lambda f: rewrite(f, fingerprint=None), "field 'fingerprint' is missing"),
        (lambda f: rewrite(f, members=[["up"]]), "field 'members' has an unexpected value"),
        (lambda f: rewrite(f, settings={"steps": 3}), "field 'settings' has an unexpected value"),
        (lambda f: rewrite(f, {"gradient": torch.ones(5)}), r"tensor 'gradient' should have shape \(2,\), found \(5,\)"),
        (lambda f: rewrite(f, {"attributions": torch.ones(2)}), "tensor 'attributions' should have shape"),
        (lambda f: rewrite(f, {"gradient_norms": torch.ones(3, 2)}), r"'gradient_norms' should have shape \(5, 2\)"),
    ],
    ids=["safetensors", "json", "zip", "kind", "version", "field", "members", "settings", "shape", "dimensions", "norms"],
)
def test_foreign_file(file, spoil, message):
    """The message names the file, what it should be, and what it is."""
    spoil(file)
    with pytest.raises(FormatError, match=rf"scores\.safetensors: .*{message}"):
        LayerScores.load(file)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: no such file; expected a COBRA layer scores"):
        LayerScores.load(tmp_path / "none.safetensors")
