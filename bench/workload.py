"""MiniLM with a classification head and batches of a fixed shape, the workload of most benchmarks of a whole model; SmolLM2."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from cobra.cli.encoder import load_encoder
from cobra.cli.subject import find_model


def minilm() -> nn.Module:
    """The demo's encoder with a random head, in evaluation mode (no dropout)."""
    model, _ = load_encoder()
    nn.init.normal_(model.classifier.weight, std=0.05)
    return model.eval()


def smollm2() -> nn.Module:
    """SmolLM2-135M from its package, in evaluation mode."""
    return find_model("smollm2").load(seed=0).eval()


def batch(rows: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens without padding, and labels."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(1000, 30000, (rows, tokens), generator=generator),
        "attention_mask": torch.ones(rows, tokens, dtype=torch.long),
        "labels": torch.randint(0, 2, (rows,), generator=generator),
    }


def forward_backward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """One forward and backward, gradients cleared."""

    def run() -> None:
        model(**inputs).loss.backward()
        for p in model.parameters():
            p.grad = None

    return run
