"""A frozen linear layer with a gated low-rank update.

    y  = x Wᵀ + b + s ((x Aᵀ) ∘ z) Bᵀ
    h  = x Aᵀ          g = s dy B
    dx = dy W + (g ∘ z) A          dA = (g ∘ z)ᵀ x          dB = s dyᵀ (h ∘ z)          dz = Σ_tokens g ∘ h

    x (..., K)   W (N, K)   b (N,)   A (r, K)   B (N, r)   z (r,) or (..., r)   y (..., N)

COBRA Eq. (3); LoRA (Hu et al. 2022) is z = 1. Saved for backward: x, h and the small operands. For z (r,), z and s are folded
into the small operand (B forward, A backward) and dz is read off dB, so nothing of the size (tokens, r) is scaled.
Gradients reach x, A, B, z, and W and b if they require them. Double backward is refused.

The Triton path selects closed gates away where z is (r,): fixed ones cost nothing, those with a gradient (it is not 0) their h
and dB. It has been compiled for sm_80 and sm_90 and interpreted, and has never run on a GPU: it is off unless asked for.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cobra_kernels import gated_lora_configs as configs
from cobra_kernels.backend import TRITON_DTYPES, check_backend, has_tiles, require_triton, uses_triton
from cobra_kernels.concrete_sample import ConcreteSample
from cobra_kernels.derivatives import check_differentiated_once, check_no_transforms
from cobra_kernels.gated_lora_linear_cpu import add_products, reduce, shrink


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
        h = shrink(x, lora_A.to(x.dtype))
        if z is None:
            y = add_products(x, weight.t(), h, lora_B.to(x.dtype).t(), bias, scaling)
        elif z.ndim == 2:
            y = add_products(x, weight.t(), h * z.to(x.dtype), lora_B.to(x.dtype).t(), bias, scaling)
        else:
            y = add_products(x, weight.t(), h, (lora_B * (scaling * z)).to(x.dtype).t(), bias)
        ctx.save_for_backward(x, weight, lora_A, lora_B, z, h)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, dy):
        check_differentiated_once("gated_lora_linear")
        x, weight, lora_A, lora_B, z, h = ctx.saved_tensors
        needs_x, needs_weight, needs_A, needs_B, needs_z, _, needs_bias = ctx.needs_input_grad
        dA = dB = dz = None
        per_token = z is not None and z.ndim == 2
        g = shrink(dy, lora_B.to(dy.dtype).t()) if needs_x or needs_A or per_token else None
        if per_token:
            gate, factor, rows = z.to(dy.dtype), ctx.scaling, lora_A
            dz = (g * h).mul_(factor).to(z.dtype) if needs_z else None
            g, h = g * gate, h * gate
        else:
            # s and z ride on the small operands: g and h stay as the products left them
            factor = ctx.scaling if z is None else ctx.scaling * z
            rows = lora_A if z is None else lora_A * z[:, None]
        if needs_B or (needs_z and dz is None):
            dB = reduce(h, dy).t().to(lora_B.dtype)
            if needs_z and dz is None:
                dz = (lora_B * dB).sum(0).mul_(ctx.scaling).to(z.dtype)
            dB = dB.mul_(factor) if needs_B else None
        if needs_A:
            dA = reduce(g, x).to(lora_A.dtype)
            dA.mul_(factor[:, None] if isinstance(factor, Tensor) else factor)
        dx = add_products(dy, weight, g, rows.to(dy.dtype), alpha=ctx.scaling) if needs_x else None
        dW = dy.t() @ x if needs_weight else None
        return dx, dW, dA, dB, dz, None, dy.sum(0) if needs_bias else None


def _forward(x, weight, bias, lora_A, lora_B, gate, temperature, draw, scaling, keep_closed):
    from cobra_kernels import gated_lora_fused

    return gated_lora_fused.forward(x, weight, bias, lora_A, lora_B, gate, temperature, draw, scaling, keep_closed)


def _forward_fake(x, weight, bias, lora_A, lora_B, gate, temperature, draw, scaling, keep_closed):
    (M, _), N, r = x.shape, weight.shape[0], len(lora_A)
    per_token = gate is not None and gate.ndim == 2
    rank_tile = configs.pick_rank_tile(r, configs.is_wide_layer(weight))
    R = configs.padded_rank(r, rank_tile, gate is not None and draw is None)
    z, source, extent = (x.new_empty(n, dtype=t) for n, t in ((r, torch.float32), (R, torch.int32), (2, torch.int32)))
    return x.new_empty(M, N), x.new_empty(M, R), x.new_empty((M, R) if per_token else 0), z, source, extent


def _backward(dy, x, weight, lora_A, lora_B, gate, temperature, h, gated, z, source, extent, scaling, needs):
    from cobra_kernels import gated_lora_fused

    operands = (dy, x, weight, lora_A, lora_B, gate, temperature, h, gated, z, source, extent)
    return gated_lora_fused.backward(*operands, scaling, needs)


def _backward_fake(dy, x, weight, lora_A, lora_B, gate, temperature, h, gated, z, source, extent, scaling, needs):
    likes = (x.new_empty(x.shape), torch.empty_like(lora_A), torch.empty_like(lora_B.t()).t())
    dgate = None if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    return tuple(t if need else dy.new_empty(0) for t, need in zip((*likes, dgate), needs, strict=True))


_OPERANDS = "Tensor x, Tensor weight{}, Tensor lora_A, Tensor lora_B, Tensor? gate, Tensor? temperature"
torch.library.define(
    "cobra::gated_lora_forward_triton",
    f"({_OPERANDS.format(', Tensor? bias')}, Tensor? draw, float scaling, bool keep_closed)"
    " -> (Tensor y, Tensor h, Tensor gated, Tensor z, Tensor source, Tensor extent)",
)
torch.library.define(
    "cobra::gated_lora_backward_triton",
    f"(Tensor dy, {_OPERANDS.format('')}, Tensor h, Tensor gated, Tensor z, Tensor source, Tensor extent, float scaling,"
    " bool[] needs) -> (Tensor dx, Tensor dA, Tensor dB, Tensor dgate)",
)
for _name, _implementation, _fake in (("forward", _forward, _forward_fake), ("backward", _backward, _backward_fake)):
    torch.library.impl(f"cobra::gated_lora_{_name}_triton", "default", _implementation)
    torch.library.register_fake(f"cobra::gated_lora_{_name}_triton", _fake)


class _TritonGatedLoraLinear(torch.autograd.Function):
    """The same over `gated_lora_fused`; gate is z, or with a draw the logits, or None."""

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, gate, scaling, bias, temperature, draw):
        keep_closed = ctx.needs_input_grad[4]
        operands = (lora_A, lora_B, gate, temperature)
        y, *saved = torch.ops.cobra.gated_lora_forward_triton.default(x, weight, bias, *operands, draw, scaling, keep_closed)
        ctx.save_for_backward(x, weight, *operands, *saved)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, dy):
        check_differentiated_once("gated_lora_linear")
        needs_x, needs_weight, needs_A, needs_B, needs_gate, _, needs_bias, *_ = ctx.needs_input_grad
        x, *rest = ctx.saved_tensors  # once: activation checkpointing refuses a second look
        needs = [needs_x, needs_A, needs_B, needs_gate]
        found = torch.ops.cobra.gated_lora_backward_triton.default(dy, x, *rest, ctx.scaling, needs)
        dx, dA, dB, dgate = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
        dW = dy.t() @ x if needs_weight else None
        return dx, dW, dA, dB, dgate, None, dy.sum(0) if needs_bias else None, None, None


def gated_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    z: Tensor | ConcreteSample | None = None,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    backend: Literal["auto", "torch", "triton"] | None = None,
) -> Tensor:
    """y = x Wᵀ + b + scaling ((x Aᵀ) ∘ z) Bᵀ, with fused products forward and backward.

    x: (..., K)
    weight: (N, K); a transposed view of a (K, N) weight is as good
    lora_A: (r, K), lora_B: (N, r), r >= 1
    z: (r,), or (..., r) with the leading shape of x, or a `ConcreteSample`; None means all gates open
    scaling: the fixed s
    bias: (N,)
    backend: "triton" needs a CUDA device, and half precision or fp32; nothing else is tried where it cannot run. None is "auto"

    out: (..., N) in the dtype of x, or in autocast's dtype. A, B and z may be fp32 beside a half-precision x.

    Raises ValueError where shapes do not fit, RuntimeError under torch.func's transforms, vmap among them, and in backward
    under create_graph.
    """
    check_no_transforms("gated_lora_linear", "give it the batch as leading dimensions of x, or use gated_lora_linear_ref")
    sample = z if isinstance(z, ConcreteSample) else None
    gate = z if sample is None else sample.logits
    check_shapes(x, weight, lora_A, lora_B, gate, bias)
    check_backend(backend)
    gate = gate.reshape(-1, gate.shape[-1]) if gate is not None and gate.ndim > 1 else gate
    flat = x.reshape(-1, x.shape[-1])
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            y = _apply(flat.to(dtype), weight, lora_A, lora_B, gate, sample, scaling, bias, backend)
    else:
        y = _apply(flat, weight, lora_A, lora_B, gate, sample, scaling, bias, backend)
    return y.view(*x.shape[:-1], weight.shape[0])


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Of the products of x under autocast; None where there is none."""
    device = x.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else None


def _apply(x, weight, lora_A, lora_B, gate, sample, scaling, bias, backend) -> Tensor:
    # cast outside the Function, so that the cast's own backward returns the gradient in the parameter's dtype
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if uses_triton(backend, x):
        _check_triton(x, lora_A, lora_B, gate)
        if len(x) and len(weight):  # else there is nothing to launch
            drawn = (None, None) if sample is None else (sample.temperature, sample.draw)
            return _TritonGatedLoraLinear.apply(x, weight, lora_A, lora_B, gate, scaling, bias, *drawn)
    z = gate if sample is None else sample.gates()
    return _GatedLoraLinear.apply(x, weight, lora_A, lora_B, z, scaling, bias)


def _check_triton(x, lora_A, lora_B, gate) -> None:
    require_triton(x)
    for name, t in {"lora_A": lora_A, "lora_B": lora_B, "z": gate}.items():
        if t is not None and t.dtype not in TRITON_DTYPES:
            raise ValueError(f"backend='triton' takes {name} in float32, bfloat16 or float16, not {t.dtype}; cast it")
    capability = torch.cuda.get_device_capability(x.device)
    if not has_tiles(capability):
        raise RuntimeError(
            "backend='triton' has tiles for compute capability 8.0 and from 9.0 on, and x is on one of"
            f" {'.'.join(map(str, capability))}; the default backend runs everywhere"
        )


def check_shapes(x, weight, lora_A, lora_B, z, bias) -> None:
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
