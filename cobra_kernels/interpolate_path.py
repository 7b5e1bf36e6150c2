"""The straight path between a baseline and an input, folded into the batch.

    x_i = x0 + alpha_i (x - x0)          x, x0 (B, ...)   alphas (m,)   ->   (m B, ...), point-major

Each point is computed as x + (1 - alpha_i) (x0 - x) where alpha_i > 1/2, so that alpha = 0 and 1 give x0 and x exactly.
Points are computed in fp32 (fp64 for fp64 inputs) and rounded once: alphas in half precision would fall on a coarse grid.

    dx = Σ_i alpha_i d_i          dx0 = Σ_i (1 - alpha_i) d_i          from the gradient d_i of every point; none for alphas

The Triton path has been compiled for sm_80 and sm_90 and interpreted, and has never run on a GPU: it is off unless asked for.
"""

from typing import Literal

import torch
from torch import Tensor

from cobra_kernels.backend import require_triton
from cobra_kernels.precision import full_precision


def interpolate_path_ref(x: Tensor, baseline: Tensor, alphas: Tensor) -> Tensor:
    """x (B, ...), baseline (B, ...) or broadcastable to it, alphas (m,) -> (m B, ...) in the dtype of x"""
    out_dtype, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, baseline = x.to(dtype), baseline.to(dtype).expand_as(x)
    a = alphas.to(device=x.device, dtype=dtype).reshape(-1, *[1] * x.ndim)
    points = torch.where(a > 0.5, x + (1 - a) * (baseline - x), baseline + a * (x - baseline))
    return points.to(out_dtype).flatten(0, 1)


def _eager(x: Tensor, baseline: Tensor, alphas: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    a = alphas.to(device=x.device, dtype=dtype).reshape(-1, *[1] * x.ndim)
    points = torch.lerp(baseline.to(dtype).expand_as(x), x.to(dtype), a)  # the same two forms, in one pass
    return points.to(x.dtype).flatten(0, 1)


def _triton(x: Tensor, baseline: Tensor, alphas: Tensor) -> Tensor:
    from cobra_kernels.interpolate_path_triton import launch

    return launch(x, baseline, alphas)


def _fake(x: Tensor, baseline: Tensor, alphas: Tensor) -> Tensor:
    baseline.expand_as(x)
    return x.new_empty(len(alphas) * len(x), *x.shape[1:])


def _save(ctx, inputs, output) -> None:
    x, baseline, alphas = inputs
    ctx.save_for_backward(alphas)
    ctx.x_shape, ctx.baseline_shape, ctx.baseline_dtype = x.shape, baseline.shape, baseline.dtype


def _backward(ctx, d: Tensor):
    dtype = torch.promote_types(d.dtype, torch.float32)
    a = ctx.saved_tensors[0].to(device=d.device, dtype=dtype)
    points = d.to(dtype).reshape(len(a), *ctx.x_shape)
    with full_precision(d.device):
        dx, dx0 = torch.tensordot(a, points, 1), torch.tensordot(1 - a, points, 1)
    return dx.to(d.dtype), dx0.sum_to_size(ctx.baseline_shape).to(ctx.baseline_dtype), None


for _name, _implementation in {
    "cobra::interpolate_path": _eager,
    "cobra::interpolate_path_triton": _triton,
}.items():
    torch.library.define(_name, "(Tensor x, Tensor baseline, Tensor alphas) -> Tensor")
    torch.library.impl(_name, "default", _implementation)
    torch.library.register_fake(_name, _fake)
    torch.library.register_autograd(_name, _backward, setup_context=_save)


def interpolate_path(x: Tensor, baseline: Tensor, alphas: Tensor, *, backend: Literal["torch", "triton"] = "torch") -> Tensor:
    """Points of the path from baseline to x.

    x: (B, ...) floating point
    baseline: broadcastable to x
    alphas: (m,) in [0, 1]
    backend: "triton" needs a CUDA device, and half precision or fp32; nothing else is tried where it cannot run

    out: (m B, ...); rows i B to (i + 1) B are point i
    """
    if backend == "torch":
        return torch.ops.cobra.interpolate_path.default(x, baseline, alphas)
    if backend != "triton":
        raise ValueError(f"no backend {backend!r}; there are 'torch' and 'triton'")
    require_triton(x)
    return torch.ops.cobra.interpolate_path_triton.default(x, baseline, alphas)
