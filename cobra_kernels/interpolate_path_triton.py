"""Triton kernel of `interpolate_path`: one launch, which reads x and the baseline once and writes every point of them.

The kernel uses only builtins of `tl`, so that a copy of this module can be interpreted beside one that is compiled.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _interpolate_kernel(
    x_ptr,
    baseline_ptr,
    alphas_ptr,
    out_ptr,
    size,
    points,
    T,
    D,
    stride_xb,
    stride_xt,
    stride_xd,
    stride_0b,
    stride_0t,
    stride_0d,
    BLOCK: tl.constexpr,
):
    """Grid (blocks,): BLOCK elements of x (B, T, D), all points of the path through them; `size` elements a point."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    d = offs % D
    t = offs // D % T
    b = offs // D // T
    x = tl.load(x_ptr + b * stride_xb + t * stride_xt + d * stride_xd, mask=mask, other=0.0).to(tl.float32)
    x0 = tl.load(baseline_ptr + b * stride_0b + t * stride_0t + d * stride_0d, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + offs
    for i in range(points):
        a = tl.load(alphas_ptr + i)
        point = tl.where(a > 0.5, x + (1 - a) * (x0 - x), x0 + a * (x - x0))
        tl.store(out_ptrs, point.to(out_ptr.dtype.element_ty), mask=mask)
        out_ptrs += size


@dataclass(frozen=True)
class InterpolateConfig:
    BLOCK: int
    num_warps: int
    num_stages: int


def pick_config(size: int) -> InterpolateConfig:
    """size: elements of x; small ones are cut finer, so that every multiprocessor has some"""
    if size < 1 << 18:
        return InterpolateConfig(BLOCK=256, num_warps=2, num_stages=1)
    return InterpolateConfig(BLOCK=1024, num_warps=4, num_stages=1)


def launch(x: Tensor, baseline: Tensor, alphas: Tensor) -> Tensor:
    """Operands as in `interpolate_path`."""
    points, (B, *rest) = len(alphas), x.shape
    out = torch.empty(points * B, *rest, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    config, D = pick_config(x.numel()), rest[-1] if rest else 1
    x3, baseline3 = (t.reshape(B, -1, D) for t in (x, baseline.to(x.dtype).expand_as(x)))
    alphas = alphas.to(device=x.device, dtype=torch.float32).contiguous()
    with torch.cuda.device_of(x):
        _interpolate_kernel[(-(-x.numel() // config.BLOCK),)](
            x3, baseline3, alphas, out, x.numel(), points, *x3.shape[1:], *x3.stride(), *baseline3.stride(), **vars(config)
        )
    return out
