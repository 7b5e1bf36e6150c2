"""A frozen linear layer with a gated low-rank update.

    y  = x Wᵀ + b + s ((x Aᵀ) ∘ z) Bᵀ
    h  = x Aᵀ          g = s dy B
    dx = dy W + (g ∘ z) A          dA = (g ∘ z)ᵀ x          dB = s dyᵀ (h ∘ z)          dz = Σ_tokens g ∘ h

    x (..., K)   W (N, K)   b (N,)   A (r, K)   B (N, r)   z (r,) or (..., r)   y (..., N)

COBRA Eq. (3); LoRA (Hu et al. 2022) is z = 1. Saved for backward: x, h and the small operands. For z (r,), z and s are folded
into the small operand (B forward, A backward) and dz is read off dB, so nothing of the size (tokens, r) is scaled.
Gradients reach x, A, B, z, and W and b if they require them. Double backward is not supported.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def gated_lora_linear_ref(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    z: Tensor | None = None,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """The equation as it is written; arguments as in `gated_lora_linear`."""
    h = F.linear(x, lora_A)
    return F.linear(x, weight, bias) + scaling * F.linear(h if z is None else h * z, lora_B)


class _GatedLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, z, scaling, bias):
        per_token = z.ndim == 2
        h = x @ lora_A.t()
        y = F.linear(x, weight, bias)
        if per_token:
            y.addmm_(h * z, lora_B.t(), alpha=scaling)
        else:
            y.addmm_(h, (lora_B * (scaling * z)).t())
        ctx.save_for_backward(x, weight, lora_A, lora_B, z, h)
        ctx.scaling, ctx.per_token = scaling, per_token
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, z, h = ctx.saved_tensors
        needs_x, needs_weight, needs_A, needs_B, needs_z, _, needs_bias = ctx.needs_input_grad
        scaling, per_token = ctx.scaling, ctx.per_token
        dx = dA = dB = dz = None
        if per_token:
            g = (dy @ lora_B).mul_(scaling)
            gated_g, gated_A = g * z, lora_A
            dz = g * h if needs_z else None
            dB = (dy.t() @ (h * z)).mul_(scaling) if needs_B else None
        else:
            # g without s and z: both ride on the small operands
            gated_g, gated_A = dy @ lora_B, lora_A * (scaling * z)[:, None]
            if needs_B or needs_z:
                dB = dy.t() @ h
                dz = (lora_B * dB).sum(0).mul_(scaling) if needs_z else None
                dB = dB.mul_(scaling * z) if needs_B else None
        if needs_A:
            dA = gated_g.t() @ x
            dA = dA if per_token else dA.mul_((scaling * z)[:, None])
        if needs_x:
            dx = torch.addmm(dy @ weight, gated_g, gated_A)
        dW = dy.t() @ x if needs_weight else None
        return dx, dW, dA, dB, dz, None, dy.sum(0) if needs_bias else None


def gated_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    z: Tensor | None = None,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + b + scaling ((x Aᵀ) ∘ z) Bᵀ, with fused products forward and backward.

    x: (..., K)
    weight: (N, K); a transposed view of a (K, N) weight is as good
    lora_A: (r, K), lora_B: (N, r), r >= 1
    z: (r,), or (..., r) with the leading shape of x; None means all gates open
    scaling: the fixed s
    bias: (N,)

    out: (..., N) in the dtype of x, or in autocast's dtype. A, B and z may be fp32 beside a half-precision x.

    Raises ValueError where shapes do not fit.
    """
    _check_shapes(x, weight, lora_A, lora_B, z, bias)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    z = torch.ones_like(lora_A[:, 0]) if z is None else z
    rows = x.shape[:-1]
    if z.ndim > 1:
        z = z.reshape(-1, z.shape[-1])
    operands = (x.reshape(-1, x.shape[-1]), weight, lora_A, lora_B, z)
    # outside the Function, so that a cast's own backward returns each gradient in its parameter's dtype
    operands = (t.to(dtype) for t in operands)
    with torch.autocast(device, enabled=False):
        y = _GatedLoraLinear.apply(*operands, scaling, None if bias is None else bias.to(dtype))
    return y.view(*rows, weight.shape[0])


def _check_shapes(x, weight, lora_A, lora_B, z, bias) -> None:
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (N, K)")
    (N, K), r = weight.shape, lora_A.shape[0]
    expected = {"x": (x, (*x.shape[:-1], K)), "lora_A": (lora_A, (r, K)), "lora_B": (lora_B, (N, r))}
    if bias is not None:
        expected["bias"] = (bias, (N,))
    if z is not None:
        expected["z"] = (z, (r,) if z.ndim == 1 else (*x.shape[:-1], r))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape} beside weight ({N}, {K}) and rank {r}")
