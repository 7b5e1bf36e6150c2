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
from cobra_kernels.derivatives import check_differentiated_once, check_no_transforms
from cobra_kernels.gated_lora_linear import autocast_dtype, check_shapes, gated_lora_linear, gated_lora_linear_ref
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
    def backward(ctx, *gradients):
        check_differentiated_once("gated_lora_linears")
        x, H, *tensors = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        layers, needs = ([flat[i : i + FIELDS] for i in range(0, len(flat), FIELDS)] for flat in (tensors, needs))
        parts = H.split([len(lora_A) for _, lora_A, *_ in layers], 1)
        found: list[list[Tensor | None]] = [[None] * FIELDS for _ in layers]
        used = [i for i, dy in enumerate(gradients) if dy is not None]
        for i in used:
            found[i] = _of_one(x, parts[i], gradients[i], layers[i], ctx.scalings[i], needs[i])
        dx, needs_A = None, [i for i in used if needs[i][1]]
        if used and (needs_x or needs_A):
            factors = [s if z is None else (s * z)[:, None] for s, (_, _, _, z, _) in zip(ctx.scalings, layers, strict=True)]
            G = torch.cat([shrink(gradients[i], layers[i][2].to(x.dtype).t()) for i in used], 1)
            if needs_A:
                each = reduce(G, x).split([len(layers[i][1]) for i in used])
                dA = dict(zip(used, each, strict=True))
                for i in needs_A:
                    found[i][1] = (dA[i].to(layers[i][1].dtype) * factors[i]).to(layers[i][1].dtype)
            if needs_x:
                rows = torch.cat([(layers[i][1] * factors[i]).to(x.dtype) for i in used])
                dx = add_products(gradients[used[0]], layers[used[0]][0], G, rows)
                for i in used[1:]:
                    dx.addmm_(gradients[i], layers[i][0])
        return dx, None, *(gradient for of_layer in found for gradient in of_layer)


def _of_one(
    x: Tensor, h: Tensor, dy: Tensor, layer: Sequence[Tensor], scaling: float, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of a layer's operands but for lora_A."""
    _, _, lora_B, z, _ = layer
    needs_weight, _, needs_B, needs_z, needs_bias = needs
    dB = dz = None
    if needs_B or needs_z:
        dB = reduce(h, dy).t().to(lora_B.dtype)
        dz = (lora_B * dB).sum(0).mul_(scaling).to(z.dtype) if needs_z else None
        dB = dB.mul_(scaling if z is None else scaling * z) if needs_B else None
    return [dy.t() @ x if needs_weight else None, None, dB, dz, dy.sum(0) if needs_bias else None]


def gated_lora_linears(
    x: Tensor, layers: Sequence[GatedLora], *, backend: Literal["auto", "torch", "triton"] | None = None
) -> tuple[Tensor, ...]:
    """y of every layer, in their order.

    x: (..., K)
    backend: as in `gated_lora_linear`

    out: (..., N_i) each, in the dtype of x, or in autocast's dtype

    Raises ValueError where shapes do not fit, or for gates of tokens, RuntimeError as `gated_lora_linear` does.
    """
    check_backend(backend)
    check_no_transforms("gated_lora_linears", "give it the batch as leading dimensions of x, or use gated_lora_linears_ref")
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
