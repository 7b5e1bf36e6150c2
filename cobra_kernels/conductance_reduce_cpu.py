"""`conductance_reduce` in one pass over each tensor (`csrc/conductance.cpp`): the same bits for any number of threads."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from cobra_kernels import extension

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def takes(h: Tensor, grad: Tensor) -> bool:
    """Whether the compiled function is there, and the numbers are where their pointers say."""
    return (
        all(type(t) is Tensor and t.is_cpu and not t.is_neg() and not t._is_zerotensor() for t in (h, grad))
        and h.dtype == grad.dtype
        and h.dtype in FORMATS
        and _get_current_dispatch_mode() is None
        and extension.load() is not None
    )


def reduce(h: Tensor, grad: Tensor, q: Tensor) -> Tensor:
    """h (m, B, F), grad (n, B, F), q (n, m) -> (B,) fp32"""
    h, grad = (t if t.stride(2) == 1 else t.contiguous() for t in (h, grad))
    q = q.to(device="cpu", dtype=torch.float64).contiguous()
    out = torch.empty(h.shape[1], dtype=torch.float32, device="cpu")
    pointers = h.data_ptr(), grad.data_ptr(), q.data_ptr(), out.data_ptr()
    sizes = (*q.shape, *h.shape[1:], *h.stride()[:2], *grad.stride()[:2])
    threads = torch.get_num_threads()
    if extension.load().cobra_conductance(*pointers, *sizes, FORMATS[h.dtype], threads, extension.CPU_LEVEL):
        raise MemoryError(f"no memory for the partial sums of {h.shape[1]} examples")
    return out
