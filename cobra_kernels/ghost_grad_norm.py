"""Per-example norm of a linear layer's weight gradient, without the gradient.

    ‖∇W‖² = ‖ Σ_t dy_t x_tᵀ ‖² = ⟨ X Xᵀ, G Gᵀ ⟩          X (T, K) inputs, G (T, N) output gradients of one example

    x (B, T, K)   dy (B, T, N)   ->   (B,)          COBRA Eq. (2), the norm under the expectation

The Gram form costs T² (K + N) products and T² memory, the direct form T K N and K N; the cheaper one is chosen by shape
(`prefers_gram`). Either way one example's temporaries live at a time in a chunk of bounded size. Sums are fp32, or fp64 for
fp64 inputs, under autocast too. No gradient flows back.

The Triton path stores no such temporary, and halves the Gram form by its symmetry. It has been compiled for sm_80 and sm_90 and
interpreted, and has never run on a GPU: it is off unless asked for.
"""

from typing import Literal

import torch
from torch import Tensor

from cobra_kernels.backend import require_triton
from cobra_kernels.precision import full_precision

CHUNK_ELEMENTS = 1 << 24


def prefers_gram(T: int, K: int, N: int) -> bool:
    """Whether the Gram form needs fewer products than the direct one."""
    return T * (K + N) <= K * N


def ghost_grad_norm_ref(x: Tensor, dy: Tensor) -> Tensor:
    """x (B, T, K), dy (B, T, N) -> squared norms (B,), through the gradients themselves"""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.einsum("btn,btk->bnk", dy.to(dtype), x.to(dtype)).square().sum((1, 2))


def _eager(x: Tensor, dy: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, dy = x.to(dtype), dy.to(dtype)
    B, T, K = x.shape
    N = dy.shape[2]
    if T == 1:
        return (x.square().sum(2) * dy.square().sum(2))[:, 0]
    gram = prefers_gram(T, K, N)
    chunk = max(1, CHUNK_ELEMENTS // max(1, T * T if gram else K * N))
    with full_precision(x.device):
        norms = [
            _gram(x[i : i + chunk], dy[i : i + chunk]) if gram else _direct(x[i : i + chunk], dy[i : i + chunk])
            for i in range(0, B, chunk)
        ]
    return torch.cat(norms) if norms else x.new_zeros(0)


def _gram(x: Tensor, dy: Tensor) -> Tensor:
    # `sum` adds in pairs, which a dot product does not; where tokens cancel, rounding can leave it below zero
    return (x @ x.mT).mul_(dy @ dy.mT).sum((1, 2)).clamp_min_(0)


def _direct(x: Tensor, dy: Tensor) -> Tensor:
    return (dy.mT @ x).square_().sum((1, 2))


def _triton(x: Tensor, dy: Tensor) -> Tensor:
    from cobra_kernels.ghost_grad_norm_triton import launch

    return launch(x, dy)


def _fake(x: Tensor, dy: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


for _name, _implementation in {"cobra::ghost_grad_norm": _eager, "cobra::ghost_grad_norm_triton": _triton}.items():
    torch.library.define(_name, "(Tensor x, Tensor dy) -> Tensor")
    torch.library.impl(_name, "default", _implementation)
    torch.library.register_fake(_name, _fake)


def ghost_grad_norm(x: Tensor, dy: Tensor, *, backend: Literal["torch", "triton"] = "torch") -> Tensor:
    """Squared Frobenius norm of each example's weight gradient.

    x: (B, T, K), or (B, K) for one token an example
    dy: (B, T, N), or (B, N)
    backend: "triton" needs a CUDA device, and half precision or fp32; nothing else is tried where it cannot run

    out: (B,) fp32, or fp64 for fp64 inputs
    """
    if x.shape[:-1] != dy.shape[:-1] or x.ndim not in (2, 3):
        raise ValueError(f"x {tuple(x.shape)} and dy {tuple(dy.shape)} must be (B, T, features) or (B, features) alike")
    x, dy = (t.detach() if t.ndim == 3 else t.detach().unsqueeze(1) for t in (x, dy))
    if backend == "torch":
        return torch.ops.cobra.ghost_grad_norm.default(x, dy)
    if backend != "triton":
        raise ValueError(f"no backend {backend!r}; there are 'torch' and 'triton'")
    require_triton(x)
    return torch.ops.cobra.ghost_grad_norm_triton.default(x, dy.to(x.dtype))
