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
    """x, weight and bias share the dtype of the products; A, B and z may be wider, are folded as they are and cast once."""

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, z, scaling, bias):
        h = x @ lora_A.to(x.dtype).t()
        y = F.linear(x, weight, bias)
        if z.ndim == 2:
            y.addmm_(h * z.to(x.dtype), lora_B.to(x.dtype).t(), alpha=scaling)
        else:
            y.addmm_(h, (lora_B * (scaling * z)).to(x.dtype).t())
        ctx.save_for_backward(x, weight, lora_A, lora_B, z, h)
        ctx.scaling = scaling
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, z, h = ctx.saved_tensors
        needs_x, needs_weight, needs_A, needs_B, needs_z, _, needs_bias = ctx.needs_input_grad
        dx = dA = dB = dz = None
        g = dy @ lora_B.to(dy.dtype)
        if z.ndim == 2:
            gate, gated_A = z.to(dy.dtype) * ctx.scaling, lora_A
            if needs_z:
                dz = (g * h).mul_(ctx.scaling).to(z.dtype)
            if needs_B:
                dB = (dy.t() @ (h * gate)).to(lora_B.dtype)
            g = g * gate
            dA = (g.t() @ x).to(lora_A.dtype) if needs_A else None
        else:
            # s and z ride on the small operands: g stays as the product left it
            gate = ctx.scaling * z
            gated_A = lora_A * gate[:, None]
            if needs_B or needs_z:
                ungated_dB = (dy.t() @ h).to(lora_B.dtype)
                dz = (lora_B * ungated_dB).sum(0).mul_(ctx.scaling).to(z.dtype) if needs_z else None
                dB = ungated_dB.mul_(gate) if needs_B else None
            if needs_A:
                dA = (g.t() @ x).to(lora_A.dtype).mul_(gate[:, None])
        if needs_x:
            dx = (dy @ weight).addmm_(g, gated_A.to(dy.dtype))
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
    z = torch.ones_like(lora_A[:, 0]) if z is None else z
    z = z.reshape(-1, z.shape[-1]) if z.ndim > 1 else z
    flat = x.reshape(-1, x.shape[-1])
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            y = _apply(flat.to(dtype), weight, lora_A, lora_B, z, scaling, bias)
    else:
        y = _apply(flat, weight, lora_A, lora_B, z, scaling, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _apply(x, weight, lora_A, lora_B, z, scaling, bias) -> Tensor:
    # cast outside the Function, so that the cast's own backward returns the gradient in the parameter's dtype
    return _GatedLoraLinear.apply(x, weight.to(x.dtype), lora_A, lora_B, z, scaling, None if bias is None else bias.to(x.dtype))


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
