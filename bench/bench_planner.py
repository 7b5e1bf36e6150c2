"""Unmerged adapters on this CPU: seconds that a plan predicts, beside those measured after the bare layer.

One adapter: x Aᵀ, then addmm into the layer's output. Eight adapters of equal rank: the same as batched products. The device
is what `measure_cpu` finds. The ratio is predicted / measured; below 1 the machine stays under its peaks.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from cobra.deploy.cost import SiteShape, Workload, unmerged_cost
from cobra.deploy.device import measure_cpu
from cobra.timing import Comparison, Timing

SHAPES = ((384, 384), (384, 1536), (1536, 384))
RANKS = (4, 16, 64)
ADAPTERS = 8
LAYERS = 4  # in turn, so that matrices do not stay in the innermost cache


def run(rounds: int = 11) -> list[Comparison]:
    device = measure_cpu()
    comparisons = []
    for adapters, tokens in ((1, 1), (1, 512), (ADAPTERS, ADAPTERS), (ADAPTERS, 512)):
        choice = "packed" if adapters == 1 else "padded"
        for K, N in SHAPES:
            for rank in RANKS:
                site = SiteShape("layer", K, N, (rank,) * adapters, "float32")
                predicted = unmerged_cost(site, device, Workload(tokens), choice).seconds
                measured = measure(site, tokens, rounds)
                what = f"{choice}, {adapters} of r={rank}, {K} → {N}, {tokens} tokens"
                timings = (Timing("measured", measured), Timing("predicted", (predicted,) * rounds))
                comparisons.append(Comparison(what, "measured", timings))
    return comparisons


@torch.inference_mode()
def measure(site: SiteShape, tokens: int, rounds: int) -> tuple[float, ...]:
    """Seconds of one layer's update, a mean over the layers each round; the bare layer runs before it and is not counted."""
    K, N, adapters, rank = site.in_features, site.out_features, len(site.ranks), site.ranks[0]
    shape = () if adapters == 1 else (adapters,)
    x = torch.randn(*shape, tokens // adapters, K)
    weights = [torch.randn(N, K) for _ in range(LAYERS)]
    matrices = [(torch.randn(*shape, rank, K).mT, torch.randn(*shape, N, rank).mT) for _ in range(LAYERS)]
    update = _update if adapters == 1 else _batched_update
    return tuple(_round(update, x, weights, matrices) for _ in range(rounds + 2))[2:]


def _round(update: Callable, x: Tensor, weights: list[Tensor], matrices: list[tuple[Tensor, Tensor]]) -> float:
    seconds = 0.0
    for weight, (lora_A, lora_B) in zip(weights, matrices, strict=True):
        y = x @ weight.t()
        start = time.perf_counter()
        update(y, x, lora_A, lora_B)
        seconds += time.perf_counter() - start
    return seconds / len(weights)


def _update(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    y.addmm_(x @ lora_A, lora_B)


def _batched_update(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    y.baddbmm_(torch.bmm(x, lora_A), lora_B)
