"""Path attribution of one layer, per example: the layer's changes along a path times the gradients they meet.

    A(x) = Σ_ij Q_ij ⟨ ∂F/∂h(α_i), h(α_j) ⟩ = Σ_i ⟨ ∂F/∂h(α_i), (Q h)_i ⟩

    h, grad (m, B, ...)   Q (m, m)   ->   A (B,)          summed over points, tokens and features

The matrix Q is the estimator: differences of neighbouring points give conductance (Dhamdhere et al. 2018, as captum computes
it), w_i (h(1) - h(0)) gives COBRA Eq. (1), a spectral differentiation matrix gives the high-order rules. `cobra/path.py`
builds them. Sums are fp32 (fp64 for fp64 inputs), also for half-precision tensors and under autocast.
"""

import torch
from torch import Tensor

from cobra_kernels.precision import full_precision

BLOCK_ELEMENTS = 1 << 18  # points are taken a few at a time, so that their differences stay in a core's cache


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
    total = h.new_zeros(h.shape[1], dtype=dtype)
    h, grad = h.flatten(2), grad.flatten(2)
    rows = q.abs().sum(1).nonzero().flatten().tolist()
    size = max(1, BLOCK_ELEMENTS // max(1, h[0].numel()))
    with full_precision(h.device):
        for block in (rows[i : i + size] for i in range(0, len(rows), size)):
            columns = q[block].abs().sum(0).nonzero().flatten().tolist()
            # differences first, products second: the small differences of near-equal points keep their digits
            weights = q[block][:, columns].to(device=h.device, dtype=dtype)
            delta = weights @ _points(h, columns).to(dtype).flatten(1)
            total += delta.view(len(block), *h.shape[1:]).mul_(_points(grad, block)).sum((0, 2))
    return total


def _points(t: Tensor, indices: list[int]) -> Tensor:
    """Points of a path, a view where they are neighbours."""
    first, last = indices[0], indices[-1]
    return t[first : last + 1] if last - first + 1 == len(indices) else t[indices]
