"""The points of the path folded into the batch, beside plain torch and a write of the same bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from cobra.timing import Comparison, compare
from cobra_kernels import interpolate_path, interpolate_path_ref
from cobra_kernels.testing import assert_within_budget

POINTS = 50


def run(rounds: int = 25) -> list[Comparison]:
    return [_at(1, 32, 384, rounds), _at(8, 64, 384, rounds)]


def _at(B: int, T: int, D: int, rounds: int) -> Comparison:
    x, baseline, alphas = torch.randn(B, T, D), torch.randn(D), torch.linspace(0, 1, POINTS)
    written = torch.empty(POINTS * B, T, D)

    def plain() -> Tensor:
        return (baseline + alphas.view(-1, 1, 1, 1) * (x - baseline)).flatten(0, 1)

    oracle = interpolate_path_ref(x.double(), baseline.double(), alphas.double())
    assert_within_budget(interpolate_path(x, baseline, alphas), plain(), oracle)
    alternatives = {
        "write of the same bytes": lambda: written.fill_(1.0),
        "cobra": lambda: interpolate_path(x, baseline, alphas),
        "plain torch": plain,
        "torch.compile": torch.compile(plain),
    }
    work = f"interpolate_path, {B} × {T} × {D}, {POINTS} points, {written.numel() * 4 / 1e6:.0f} MB"
    return compare(work, "write of the same bytes", alternatives, rounds, amount=written.numel() * 4, unit="B")
