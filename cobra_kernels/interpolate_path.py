"""The straight path between a baseline and an input, folded into the batch.

    x_i = x0 + alpha_i (x - x0)          x, x0 (B, ...)   alphas (m,)   ->   (m B, ...), point-major

Each point is computed as x + (1 - alpha_i) (x0 - x) where alpha_i > 1/2, so that alpha = 0 and 1 give x0 and x exactly.
Points are computed in fp32 (fp64 for fp64 inputs) and rounded once: alphas in half precision would fall on a coarse grid.
"""

import torch
from torch import Tensor


def interpolate_path_ref(x: Tensor, baseline: Tensor, alphas: Tensor) -> Tensor:
    """x (B, ...), baseline (B, ...) or broadcastable to it, alphas (m,) -> (m B, ...) in the dtype of x"""
    out_dtype, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, baseline = x.to(dtype), baseline.to(dtype).expand_as(x)
    a = alphas.to(device=x.device, dtype=dtype).reshape(-1, *[1] * x.ndim)
    points = torch.where(a > 0.5, x + (1 - a) * (baseline - x), baseline + a * (x - baseline))
    return points.to(out_dtype).flatten(0, 1)


def interpolate_path(x: Tensor, baseline: Tensor, alphas: Tensor) -> Tensor:
    """Points of the path from baseline to x.

    x: (B, ...) floating point
    baseline: broadcastable to x
    alphas: (m,) in [0, 1]

    out: (m B, ...); rows i B to (i + 1) B are point i
    """
    return interpolate_path_ref(x, baseline, alphas)
