"""The products with a few ranks on a CUDA device, in CUDA C++ and in Triton beside torch's: cases of `make gpu`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cuda import compare_on_cuda
from cobra.timing import Comparison
from cobra_kernels import gated_lora_launch as launch
from cobra_kernels import skinny_cuda

NEEDS_CUDA = True
YARDSTICK = "torch"


@dataclass(frozen=True)
class Case:
    """h = x Aᵀ, or both dB = dyᵀ h and dh = dy B: `tokens` rows of `width`, `r` ranks, a multiple of 16."""

    product: str
    tokens: int
    width: int
    r: int

    def __str__(self) -> str:
        return f"{self.product}, T={self.tokens}, {self.width} × {self.r}"


def cuda_cases() -> list[Case]:
    """Widths of LLaMA-7B."""
    sizes = [(8192, 4096, 16), (8192, 4096, 64), (8192, 11008, 16), (1024, 4096, 16), (16, 4096, 16)]
    return [Case(product, *size) for size in sizes for product in ("shrink", "reduce")]


def run_on_cuda(case: Case, rounds: int = 20) -> list[Comparison]:
    """Raises AssertionError, and times nothing, where two of them do not agree."""
    alternatives = _shrink(case) if case.product == "shrink" else _reduce(case)
    expected = alternatives[YARDSTICK]()
    for run in alternatives.values():
        for found, wanted in zip(run(), expected, strict=True):
            torch.testing.assert_close(found.float(), wanted.float(), rtol=2e-2, atol=2e-2)
    return [compare_on_cuda(str(case), YARDSTICK, alternatives, rounds)]


def _shrink(case: Case) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    x, A, branch = _normal(case.tokens, case.width), _normal(case.r, case.width) / case.width**0.5, _branch(case.r)
    return {
        YARDSTICK: lambda: (x @ A.t(),),
        "triton": lambda: (launch.shrink(x, A, branch)[0],),
        "cuda": lambda: (skinny_cuda.shrink(x, A),),
    }


def _reduce(case: Case) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    dy, h, branch = _normal(case.tokens, case.width), _normal(case.tokens, case.r) / case.tokens**0.5, _branch(case.r)
    B = _normal(case.width, case.r) / case.width**0.5
    packed = B.t().contiguous()

    def triton() -> tuple[Tensor, Tensor]:
        sums, g = launch.tokens(dy, h, packed, branch)
        return sums.sum(0).t(), g.sum(0).to(dy.dtype)

    return {
        YARDSTICK: lambda: (dy.t() @ h, dy @ B),
        "triton": triton,
        "cuda": lambda: skinny_cuda.reduce(dy, h, B),
    }


def _branch(r: int) -> launch.Branch:
    source, extent = torch.arange(r, dtype=torch.int32), torch.full((2,), r, dtype=torch.int32)
    return launch.Branch(torch.ones(r, device="cuda"), source.cuda(), extent.cuda(), 1.0, r, True)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")
