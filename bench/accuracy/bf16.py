"""Products of bf16 matrices by way of fp32, for CPUs without bf16 instructions: torch multiplies there in a plain loop.

    with bf16_products():
        ...

Operands are widened, which is exact, multiplied in fp32, and the result is rounded once: what processors with bf16 instructions
do, but for the order of summation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
IN_PLACE = ("addmm_", "baddbmm_")


def is_needed() -> bool:
    """Whether this processor lacks them."""
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def bf16_products() -> Iterator[None]:
    """Inside, where `is_needed`, all threads of the process multiply bf16 matrices on the CPU by way of fp32."""
    if not is_needed():
        yield
        return
    with torch.library._scoped_library("aten", "IMPL") as library:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name in (*PRODUCTS, *IN_PLACE):
                library.impl(name, _by_fp32(name), "CPU", with_keyset=True, allow_override=True)
        yield


def _by_fp32(name: str) -> Callable[..., Tensor]:
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")  # before it is replaced

    def product(keyset: torch.DispatchKeySet, *operands: Tensor, **scales: float) -> Tensor:
        if operands[0].dtype != torch.bfloat16:
            return kernel.call_boxed(keyset, *operands, **scales)
        found = kernel.call_boxed(keyset, *(operand.float() for operand in operands), **scales)
        return operands[0].copy_(found) if name in IN_PLACE else found.bfloat16()

    return product
