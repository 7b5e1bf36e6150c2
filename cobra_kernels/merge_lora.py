"""Folding a low-rank update into a weight.

    W' = round( W + s (B ∘ z) A )          W (N, K)   A (r, K)   B (N, r)   z (r,)

The sum is fp32 (fp64 for fp64 weights) and is rounded once to the weight's dtype, under autocast too.
"""

import torch
from torch import Tensor

from cobra_kernels.precision import full_precision


def merge_lora_ref(weight: Tensor, lora_A: Tensor, lora_B: Tensor, z: Tensor | None = None, *, scaling: float = 1.0) -> Tensor:
    """The equation as it is written; arguments as in `merge_lora`."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    gated_B = lora_B.to(dtype) if z is None else lora_B.to(dtype) * z.to(dtype)
    return (weight.to(dtype) + scaling * (gated_B @ lora_A.to(dtype))).to(weight.dtype)


def merge_lora(weight: Tensor, lora_A: Tensor, lora_B: Tensor, z: Tensor | None = None, *, scaling: float = 1.0) -> Tensor:
    """The merged weight, a new tensor.

    weight: (N, K)
    lora_A: (r, K), lora_B: (N, r)
    z: (r,); None means all gates open

    out: (N, K) in the dtype of weight
    """
    N, K = weight.shape
    if lora_A.shape[1] != K or lora_B.shape != (N, lora_A.shape[0]):
        raise ValueError(
            f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit weight {tuple(weight.shape)}"
        )
    if z is not None and z.shape != lora_A.shape[:1]:
        raise ValueError(f"z {tuple(z.shape)} is not one gate for each of {lora_A.shape[0]} ranks; token gates do not merge")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    gated_B = lora_B.to(dtype) * (scaling if z is None else scaling * z.to(dtype))
    with full_precision(weight.device):
        return torch.addmm(weight.to(dtype), gated_B, lora_A.to(dtype)).to(weight.dtype)
