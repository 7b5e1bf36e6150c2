"""The two products of `gated_lora_linear` that read many tokens once, for CPUs.

    shrink   x (T, D), matrix (r, D)   ->   x matrixᵀ (T, r)          h = x Aᵀ,  g = dy B
    reduce   h (T, r), x (T, D)        ->   hᵀ x (r, D)               dA = gᵀ x,  dBᵀ = hᵀ dy

In fp32 they are compiled (csrc/skinny.cpp), since BLAS is made for larger r: the same bits for any number of threads, and no
atomics. Every other dtype, device and tensor class, and torch.compile, takes torch's own products.
"""

import torch
from torch import Tensor, nn

from cobra_kernels import extension

PLAIN = (Tensor, nn.Parameter)


def shrink(x: Tensor, matrix: Tensor) -> Tensor:
    """x (T, D), matrix (r, D) -> (T, r) in their dtype"""
    if not _is_compiled(x, matrix) or x.stride(1) != 1:
        return x @ matrix.t()
    (T, D), r = x.shape, len(matrix)
    out = torch.empty(T, r)
    sizes = (T, D, r, x.stride(0), *matrix.stride())
    pointers = x.data_ptr(), matrix.data_ptr(), out.data_ptr()
    if extension.load().cobra_shrink(*pointers, *sizes, torch.get_num_threads(), extension.CPU_LEVEL):
        raise MemoryError(f"no memory to copy a matrix of {r} × {D} in")
    return out


def reduce(h: Tensor, x: Tensor) -> Tensor:
    """h (T, r), x (T, D) -> (r, D) in their dtype"""
    if not _is_compiled(h, x) or h.stride(1) != 1 or x.stride(1) != 1:
        return h.t() @ x
    (T, D), r = x.shape, h.shape[1]
    out = torch.empty(r, D)
    sizes = (T, D, r, h.stride(0), x.stride(0))
    extension.load().cobra_reduce(
        h.data_ptr(), x.data_ptr(), out.data_ptr(), *sizes, torch.get_num_threads(), extension.CPU_LEVEL
    )
    return out


def _is_compiled(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype == torch.float32
        and type(a) in PLAIN
        and type(b) in PLAIN
        and a.is_cpu
        and b.is_cpu
        and not torch.compiler.is_compiling()
        and extension.load() is not None
    )
