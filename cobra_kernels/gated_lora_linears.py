"""Several frozen linear layers with gated low-rank updates on one input, as q, k and v or gate and up have it.

    y_i = x W_iᵀ + b_i + s_i ((x A_iᵀ) ∘ z_i) B_iᵀ
    H   = x [A_1; …; A_n]ᵀ                          G    = [dy_1 B_1, …, dy_n B_n]
    dx  = Σ_i dy_i W_i + G [s_i z_i ∘ A_i]          [dA_i] = s_i z_i ∘ Gᵀ x          dB_i, dz_i as in `gated_lora_linear`

    x (..., K)   W_i (N_i, K)   b_i (N_i,)   A_i (r_i, K)   B_i (N_i, r_i)   z_i (r_i,)   y_i (..., N_i)

All small matrices read x once forward and once backward, and the gradients of x are added in the products that make them.
The Triton path takes the layers one at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cobra_kernels.backend import check_backend, uses_triton
from cobra_kernels.gated_lora_linear import (
    autocast_dtype,
    check_no_transforms,
    check_shapes,
    gated_lora_linear,
    gated_lora_linear_ref,
)
from cobra_kernels.gated_lora_linear_cpu import add_products, reduce, shrink

FIELDS = 5  # tensors of a layer


@dataclass(frozen=True, eq=False)
class GatedLora:
    """A layer's operands, as `gated_lora_linear` takes them; z is (r,) or None."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    z: Tensor | None = None
    scaling: float = 1.0
    bias: Tensor | None = None


def gated_lora_linears_ref(x: Tensor, layers: Sequence[GatedLora]) -> tuple[Tensor, ...]:
    """The equation as it is written; arguments as in `gated_lora_linears`."""
    return tuple(gated_lora_linear_ref(x, **vars(layer)) for layer in layers)


class _GatedLoraLinears(torch.autograd.Function):
    """weight, lora_A, lora_B, z and bias of each layer in turn; dtypes as in `gated_lora_linear`."""

    @staticmethod
    def forward(ctx, x, scalings, *tensors):
        layers = [tensors[i : i + FIELDS] for i in range(0, len(tensors), FIELDS)]
        H = shrink(x, torch.cat([lora_A.to(x.dtype) for _, lora_A, *_ in layers]))
        outputs, first = [], 0
        for (weight, lora_A, lora_B, z, bias), scaling in zip(layers, scalings, strict=True):
            h = H[:, first : first + len(lora_A)]
            first += len(lora_A)
            small, alpha = (lora_B, scaling) if z is None else (lora_B * (scaling * z), 1)
            outputs.append(add_products(x, weight.t(), h, small.to(x.dtype).t(), bias, alpha))
        ctx.save_for_backward(x, H, *tensors)
        ctx.scalings = scalings
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        x, H, *tensors = ctx.saved_tensors
        found: list[Tensor | None] = [None] * len(tensors)
        rows, parts, places, products, dx, first = [], [], [], [], None, 0
        for i, (dy, scaling) in enumerate(zip(gradients, ctx.scalings, strict=True)):
            at = i * FIELDS
            weight, lora_A, lora_B, z, _ = tensors[at : at + FIELDS]
            h = H[:, first : first + len(lora_A)]
            first += len(lora_A)
            if dy is None:
                continue
            _, needs_A, needs_B, needs_z, needs_bias = needs = ctx.needs_input_grad[2 + at : 2 + at + FIELDS]
            factor = scaling if z is None else scaling * z
            if needs_B or needs_z:
                dB = reduce(h, dy).t().to(lora_B.dtype)
                found[at + 3] = (lora_B * dB).sum(0).mul_(scaling).to(z.dtype) if needs_z else None
                found[at + 2] = dB.mul_(factor) if needs_B else None
            if needs[0]:
                found[at] = dy.t() @ x
            found[at + 4] = dy.sum(0) if needs_bias else None
            if ctx.needs_input_grad[0] or needs_A:
                factor = factor[:, None] if z is not None else torch.full((len(lora_A), 1), scaling, device=x.device)
                parts.append(shrink(dy, lora_B.to(dy.dtype).t()))
                rows.append((lora_A * factor).to(x.dtype))
                products.append((dy, weight))
                places.append((at + 1, len(lora_A), factor, lora_A.dtype, needs_A))
        if parts:
            G = torch.cat(parts, 1)
            if any(needs_A for *_, needs_A in places):
                each = reduce(G, x).split([r for _, r, *_ in places])
                for (place, _, factor, dtype, needs_A), dA in zip(places, each, strict=True):
                    found[place] = (dA.to(dtype) * factor).to(dtype) if needs_A else None
            if ctx.needs_input_grad[0]:
                dx = add_products(*products[0], G, torch.cat(rows))
                for dy, weight in products[1:]:
                    dx.addmm_(dy, weight)
        return dx, None, *found


def gated_lora_linears(
    x: Tensor, layers: Sequence[GatedLora], *, backend: Literal["auto", "torch", "triton"] | None = None
) -> tuple[Tensor, ...]:
    """y of every layer, in their order.

    x: (..., K)
    backend: as in `gated_lora_linear`

    out: (..., N_i) each, in the dtype of x, or in autocast's dtype

    Raises ValueError where shapes do not fit, or for gates of tokens.
    """
    check_backend(backend)
    check_no_transforms()
    if uses_triton(backend, x):
        return tuple(gated_lora_linear(x, **vars(layer), backend=backend) for layer in layers)
    for i, layer in enumerate(layers):
        check_shapes(x, layer.weight, layer.lora_A, layer.lora_B, layer.z, layer.bias)
        if layer.z is not None and layer.z.ndim != 1:
            raise ValueError(f"layer {i} has gates of shape {tuple(layer.z.shape)}, expected ({len(layer.lora_A)},)")
    flat, dtype = x.reshape(-1, x.shape[-1]), autocast_dtype(x)
    if dtype is None:
        outputs = _apply(flat, layers)
    else:
        with torch.autocast(x.device.type, enabled=False):
            outputs = _apply(flat.to(dtype), layers)
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in outputs)


def _apply(x: Tensor, layers: Sequence[GatedLora]) -> tuple[Tensor, ...]:
    tensors: list[Tensor | None] = []
    for layer in layers:
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        tensors += [layer.weight.to(x.dtype), layer.lora_A, layer.lora_B, layer.z, bias]
    return _GatedLoraLinears.apply(x, tuple(layer.scaling for layer in layers), *tensors)
