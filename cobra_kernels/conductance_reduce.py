"""Path attribution of one layer, per example: the layer's changes along a path times the gradients they meet.

    A(x) = Σ_ij Q_ij ⟨ ∂F/∂h(α_i), h(α_j) ⟩ = Σ_i ⟨ ∂F/∂h(α_i), (Q h)_i ⟩

    h, grad (m, B, ...)   Q (m, m)   ->   A (B,)          summed over points, tokens and features

The matrix Q is the estimator: differences of neighbouring points give conductance (Dhamdhere et al. 2018, as captum computes
it), w_i (h(1) - h(0)) gives COBRA Eq. (1), a spectral differentiation matrix gives the high-order rules. `cobra/path.py`
builds them. Sums are fp32 (fp64 for fp64 inputs), also for half-precision tensors and under autocast.
"""

import torch
from torch import Tensor


def conductance_reduce_ref(h: Tensor, grad: Tensor, q: Tensor) -> Tensor:
    """The equation as it is written; arguments as in `conductance_reduce`."""
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    h, grad = h.to(dtype).flatten(2), grad.to(dtype).flatten(2)
    return torch.einsum("ibk,ij,jbk->b", grad, q.to(h), h)


def conductance_reduce(h: Tensor, grad: Tensor, q: Tensor) -> Tensor:
    """Attribution of one layer for each example.

    h: (m, B, ...) the layer's output at the m points
    grad: (m, B, ...) the gradient of each example's F at the same points
    q: (m, m)

    out: (B,) fp32, or fp64 for fp64 inputs
    """
    if h.shape != grad.shape or q.shape != (h.shape[0],) * 2:
        raise ValueError(
            f"h {tuple(h.shape)} and grad {tuple(grad.shape)} must agree, and q {tuple(q.shape)} be square of their points"
        )
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    rows = q.abs().sum(1).nonzero().flatten().tolist()
    if not rows:
        return h.new_zeros(h.shape[1], dtype=dtype)
    # differences first, products second: the small differences of near-equal points keep their digits
    with torch.autocast(h.device.type, enabled=False):
        delta = q[rows].to(device=h.device, dtype=dtype) @ h.to(dtype).flatten(1)
        return delta.view(len(rows), *h.shape[1:]).mul_(grad[rows]).flatten(2).sum((0, 2))
