"""Per-example norms of a layer's weight gradient from its inputs and output gradients, beside the gradients themselves."""

from __future__ import annotations

import torch

from cobra.timing import Comparison, compare
from cobra_kernels import ghost_grad_norm, ghost_grad_norm_ref
from cobra_kernels.ghost_grad_norm import prefers_gram
from cobra_kernels.testing import assert_within_budget

SHAPES = [(16, 16, 384, 384), (16, 64, 384, 1536), (16, 128, 384, 384), (16, 256, 384, 384), (4, 512, 768, 768)]


def run(rounds: int = 25) -> list[Comparison]:
    return [_at(*shape, rounds) for shape in SHAPES]


def _at(B: int, T: int, K: int, N: int, rounds: int) -> Comparison:
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(B, T, K, generator=generator), torch.randn(B, T, N, generator=generator)
    oracle = ghost_grad_norm_ref(x.double(), dy.double())
    assert_within_budget(ghost_grad_norm(x, dy), ghost_grad_norm_ref(x, dy), oracle)
    gram = prefers_gram(T, K, N)
    flops = 2 * B * (T * T * (K + N) if gram else T * K * N)
    alternatives = {
        "cobra": lambda: ghost_grad_norm(x, dy),
        "plain torch, all gradients at once": lambda: ghost_grad_norm_ref(x, dy),
        "plain torch, a gradient at a time": lambda: torch.stack(
            [(g.t() @ a).square().sum() for a, g in zip(x, dy, strict=True)]
        ),
    }
    alternatives["torch.compile, all gradients at once"] = torch.compile(lambda: ghost_grad_norm_ref(x, dy))
    form = "Gram" if gram else "direct"
    work = f"ghost_grad_norm, {B} × {T} tokens, {K} → {N}, {form} form, {flops / 1e9:.2f} GFLOP"
    return compare(work, "cobra", alternatives, rounds, amount=flops, unit="FLOP")
