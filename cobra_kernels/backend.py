"""What a backend that is asked for needs."""

from importlib.util import find_spec

import torch
from torch import Tensor

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require_triton(x: Tensor) -> None:
    """Raises where Triton kernels cannot run on x: an explicit request never falls back in silence."""
    if find_spec("triton") is None:
        raise RuntimeError(
            "backend='triton' needs the package triton, which is not installed; the default backend needs nothing"
        )
    if x.device.type != "cuda":
        raise RuntimeError(f"backend='triton' needs a CUDA device, and x is on {x.device}; the default backend runs everywhere")
    if x.dtype not in TRITON_DTYPES:
        raise ValueError(
            f"backend='triton' takes float32, bfloat16 and float16, not {x.dtype}; cast, or use the default backend"
        )
