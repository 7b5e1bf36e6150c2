"""The other operations on a CUDA device, each of their paths beside plain torch: cases of `make gpu`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cuda import compare_on_cuda
from cobra.timing import Comparison
from cobra_kernels import (
    conductance_reduce,
    gates_and_kl,
    gates_and_kl_ref,
    ghost_grad_norm,
    interpolate_path,
    packed_lora,
    segment_tokens,
)
from cobra_kernels.merge_lora import MergeItem, merge_lora_group

NEEDS_CUDA = True
YARDSTICK = "torch"


@dataclass(frozen=True)
class Case:
    """An operation, the path beside torch's, and its sizes in the order that `_pair` takes them."""

    operation: str
    backend: str
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.operation} {'×'.join(map(str, self.sizes))}, {self.backend}"


def cuda_cases() -> list[Case]:
    """Most telling first; sizes are those of LLaMA-7B, and of a batch on it."""
    cases = [Case("gates_and_kl", backend, (224, 64)) for backend in ("triton", "cuda")]
    cases += [Case("ghost_grad_norm", "triton", sizes) for sizes in ((8, 128, 4096, 4096), (8, 2048, 4096, 4096))]
    cases += [Case("conductance_reduce", "triton", (9, 8, 512, 4096)), Case("interpolate_path", "triton", (50, 8, 512, 4096))]
    cases += [Case("merge_lora", backend, (4, 4096, 4096, 16)) for backend in ("triton", "cuda")]
    return cases + [Case("packed_lora", "triton", (tokens, 4096, 4096, 8)) for tokens in (16, 2048)]


def run_on_cuda(case: Case, rounds: int = 20) -> list[Comparison]:
    """Raises AssertionError, and times nothing, where the two paths do not agree."""
    plain, fast = _pair(case)
    torch.testing.assert_close(fast(), plain(), rtol=2e-2, atol=2e-2)
    return [compare_on_cuda(str(case), YARDSTICK, {YARDSTICK: plain, case.backend: fast}, rounds)]


def _pair(case: Case) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """torch's path and the other one."""
    sizes, other = case.sizes, {"backend": case.backend}
    if case.operation == "gates_and_kl":
        logits, prior = _normal(*sizes, dtype=torch.float32), _normal(*sizes, dtype=torch.float32)
        draw = {"seed": 1, "step": 2, "temperature": 0.5}
        return lambda: gates_and_kl_ref(logits, prior, **draw)[0], lambda: gates_and_kl(logits, prior, **draw, **other)[0]
    if case.operation == "ghost_grad_norm":
        B, T, K, N = sizes
        x, dy = _normal(B, T, K), _normal(B, T, N)
        scale = (T * K * N) ** -0.5  # norms of order 1
        x = x * scale
        return lambda: ghost_grad_norm(x, dy), lambda: ghost_grad_norm(x, dy, **other)
    if case.operation == "conductance_reduce":
        h, grad = _normal(*sizes), _normal(*sizes) / sizes[-1]
        q = torch.eye(sizes[0])
        return lambda: conductance_reduce(h, grad, q), lambda: conductance_reduce(h, grad, q, **other)
    if case.operation == "interpolate_path":
        x, alphas = _normal(*sizes[1:]), torch.linspace(0, 1, sizes[0])
        baseline = torch.zeros_like(x)
        return lambda: interpolate_path(x, baseline, alphas), lambda: interpolate_path(x, baseline, alphas, **other)
    if case.operation == "merge_lora":
        count, N, K, r = sizes
        items = [MergeItem(_normal(N, K), _normal(r, K) / K**0.5, _normal(N, r)) for _ in range(count)]
        return lambda: merge_lora_group(items)[0][-1], lambda: merge_lora_group(items, **other)[0][-1]
    T, K, N, adapters = sizes
    ranks, x, base = [8 * (1 + i % 4) for i in range(adapters)], _normal(T, K), _normal(T, N)
    lora_A, lora_B = _normal(sum(ranks), K) / K**0.5, _normal(N, sum(ranks))
    ids = segment_tokens(torch.arange(T, device="cuda") % adapters)
    operands = (base, x, lora_A, lora_B, ranks, ids)
    return lambda: packed_lora(*operands), lambda: packed_lora(*operands, **other)


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")
