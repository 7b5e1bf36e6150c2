"""One layer, 8 adapters of uneven rank, 16 rows: packed beside the loop of peft's mixed batch and beside padded products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cobra.timing import Comparison, compare
from cobra_kernels.packed_lora import packed_lora_, packed_lora_ref, segment_tokens

ROWS = 16
RANKS = (4, 8, 12, 16, 24, 32, 48, 64)
LAYERS = ((576, 576), (576, 1536))
BASE = "base layer alone"


def run(rounds: int = 60) -> list[Comparison]:
    return [_at(K, N, tokens, rounds) for K, N in LAYERS for tokens in (1, 64)]


@torch.inference_mode()
def _at(K: int, N: int, tokens: int, rounds: int) -> Comparison:
    """Each alternative computes the whole layer, base included; rows of one adapter are not neighbours."""
    x, weight = torch.randn(ROWS, tokens, K), torch.randn(N, K) / K**0.5
    lora_A, lora_B = torch.randn(sum(RANKS), K) / K**0.5, (torch.randn(sum(RANKS), N) / 8).t()
    row_ids = torch.arange(ROWS) % len(RANKS)
    ids = row_ids.repeat_interleave(tokens)
    segments = segment_tokens(ids)

    def packed() -> Tensor:
        y = F.linear(x, weight)
        packed_lora_(y.view(-1, N), x.view(-1, K), lora_A, lora_B, RANKS, segments)
        return y

    alternatives = {
        BASE: lambda: F.linear(x, weight),
        "packed, segments of the batch known": packed,
        "loop over adapters, as peft's mixed batch": _loop(x, weight, lora_A, lora_B, row_ids),
        "padded to the largest rank, batched": _padded(x, weight, lora_A, lora_B, row_ids),
    }
    expected = packed_lora_ref(F.linear(x, weight).view(-1, N), x.view(-1, K), lora_A, lora_B, RANKS, ids)
    for name, alternative in alternatives.items():
        if name != BASE:
            torch.testing.assert_close(alternative().view(-1, N), expected, rtol=1e-4, atol=1e-4)
    return compare(f"{K} → {N}, {ROWS} × {tokens} tokens, 8 adapters", BASE, alternatives, rounds)


def _loop(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, row_ids: Tensor) -> Callable[[], Tensor]:
    """Rows of each adapter by mask, its own matrices, added into the output by mask."""
    pairs = [(A.contiguous(), B.contiguous()) for A, B in zip(lora_A.split(RANKS), lora_B.split(RANKS, 1), strict=True)]

    def run() -> Tensor:
        y = F.linear(x, weight)
        for adapter, (A, B) in enumerate(pairs):
            mask = row_ids == adapter
            if mask.any():
                y[mask] += F.linear(F.linear(x[mask], A), B)
        return y

    return run


def _padded(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, row_ids: Tensor) -> Callable[[], Tensor]:
    """All adapters stacked at the largest rank, the row's own gathered, one batched product each way."""
    r_max, N, K = max(RANKS), weight.shape[0], weight.shape[1]
    stacked_A, stacked_B = x.new_zeros(len(RANKS), r_max, K), x.new_zeros(len(RANKS), r_max, N)
    for adapter, (A, B) in enumerate(zip(lora_A.split(RANKS), lora_B.split(RANKS, 1), strict=True)):
        stacked_A[adapter, : RANKS[adapter]], stacked_B[adapter, : RANKS[adapter]] = A, B.t()

    def run() -> Tensor:
        h = torch.bmm(x, stacked_A[row_ids].mT)
        return F.linear(x, weight).baddbmm_(h, stacked_B[row_ids])

    return run
