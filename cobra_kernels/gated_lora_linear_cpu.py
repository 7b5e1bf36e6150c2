"""Products of `gated_lora_linear` with a small side, for CPUs: two that read many tokens once, and a sum with a large one.

    shrink   x (T, D), matrix (r, D)   ->   x matrixᵀ (T, r)          h = x Aᵀ,  g = dy B
    reduce   h (T, r), x (T, D)        ->   hᵀ x (r, D)               dA = gᵀ x,  dBᵀ = hᵀ dy

In fp32, from LEAST_TOKENS tokens on and up to rank MOST_RANK, these are compiled (csrc/skinny.cpp), since BLAS is made for
larger matrices: the same bits for any number of threads, and no atomics. All else, torch.compile and tracing take torch's own.
"""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from cobra_kernels import extension

PLAIN = (Tensor, nn.Parameter)
LEAST_TOKENS, MOST_RANK = 96, 64


def shrink(x: Tensor, matrix: Tensor) -> Tensor:
    """x (T, D), matrix (r, D) -> (T, r) in their dtype"""
    (T, D), r = x.shape, len(matrix)
    if T < LEAST_TOKENS or r > MOST_RANK or x.stride(1) != 1 or not _is_compiled(x, matrix):
        return x @ matrix.t()
    out = torch.empty(T, r, dtype=torch.float32, device="cpu")
    sizes = (T, D, r, x.stride(0), *matrix.stride())
    pointers = x.data_ptr(), matrix.data_ptr(), out.data_ptr()
    if extension.load().cobra_shrink(*pointers, *sizes, torch.get_num_threads(), extension.CPU_LEVEL):
        raise MemoryError(f"no memory to copy a matrix of {r} × {D} in")
    return out


def reduce(h: Tensor, x: Tensor) -> Tensor:
    """h (T, r), x (T, D) -> (r, D) in their dtype"""
    (T, D), r = x.shape, h.shape[1]
    if T < LEAST_TOKENS or r > MOST_RANK or h.stride(1) != 1 or x.stride(1) != 1 or not _is_compiled(h, x):
        return h.t() @ x
    out = torch.empty(r, D, dtype=torch.float32, device="cpu")
    sizes = (T, D, r, h.stride(0), x.stride(0))
    pointers = h.data_ptr(), x.data_ptr(), out.data_ptr()
    if extension.load().cobra_reduce(*pointers, *sizes, torch.get_num_threads(), extension.CPU_LEVEL):
        raise MemoryError(f"no memory to sum {T} tokens in")
    return out


def add_products(x: Tensor, weight: Tensor, h: Tensor, small: Tensor, bias: Tensor | None = None, alpha: float = 1) -> Tensor:
    """x weight + alpha h small + bias; weight (K, N), small (r, N)

    In fp32 and for many tokens the small product comes first: BLAS adds the large one to it as it would to the bias, and the
    sum is written once. Where the small one is 0, the bits are those of the large one alone.
    """
    if x.is_cpu and x.dtype == torch.float32 and len(x) >= LEAST_TOKENS:
        small = small if alpha == 1 else small * alpha
        return (h @ small if bias is None else torch.addmm(bias, h, small)).addmm_(x, weight)
    y = x @ weight if bias is None else nn.functional.linear(x, weight.t(), bias)
    return y.addmm_(h, small, alpha=alpha)


def _is_compiled(a: Tensor, b: Tensor) -> bool:
    """Whether the numbers are where the pointers say, and nobody asks torch what it does."""
    return not torch.compiler.is_compiling() and (
        a.dtype == b.dtype == torch.float32
        and all(type(t) in PLAIN and t.is_cpu and not t.is_neg() and not t._is_zerotensor() for t in (a, b))
        and _get_current_dispatch_mode() is None
        and extension.load() is not None
    )
