"""Path attribution of one layer, per example: the layer's changes along a path times the gradients they meet.

    A(x) = Σ_ij Q_ij ⟨ ∂F/∂h(α_i), h(α_j) ⟩ = Σ_i ⟨ ∂F/∂h(α_i), (Q h)_i ⟩

    h (m, B, ...)   grad (n, B, ...)   Q (n, m)   ->   A (B,)          summed over points, tokens and features

The matrix Q is the estimator: differences of neighbouring points give conductance (Dhamdhere et al. 2018, as captum computes
it), w_i (h(1) - h(0)) gives COBRA Eq. (1), a spectral differentiation matrix gives the high-order rules. `cobra/path.py`
builds them. The points of the gradients need not be those of h. Sums are fp32 (fp64 for fp64 inputs), also for half-precision
tensors and under autocast. No gradient flows back.

On the CPU each tensor is read once where the extension is built. The Triton path has been compiled for sm_80 and sm_90 and
interpreted, and has never run on a GPU: it is off unless asked for.
"""

from typing import Literal

import torch
from torch import Tensor

from cobra_kernels import conductance_reduce_cpu as compiled
from cobra_kernels.backend import require_triton
from cobra_kernels.precision import full_precision

BLOCK_ELEMENTS = 1 << 18  # points are taken a few at a time, so that their differences stay in a core's cache


def conductance_reduce_ref(h: Tensor, grad: Tensor, q: Tensor) -> Tensor:
    """The equation as it is written; arguments as in `conductance_reduce`."""
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    h, grad = (t.to(dtype).unsqueeze(-1).flatten(2) for t in (h, grad))
    return torch.einsum("ibk,ij,jbk->b", grad, q.to(h), h)


def _eager(h: Tensor, grad: Tensor, q: Tensor) -> Tensor:
    if compiled.takes(h, grad):
        return compiled.reduce(h, grad, q)
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    total, q = h.new_zeros(h.shape[1], dtype=dtype), q.double() if dtype == torch.float64 else q
    rows = q.abs().sum(1).nonzero().flatten().tolist()
    size = max(1, BLOCK_ELEMENTS // max(1, h.shape[1:].numel()))
    with full_precision(h.device):
        for block in (rows[i : i + size] for i in range(0, len(rows), size)):
            columns = q[block].abs().sum(0).nonzero().flatten().tolist()
            # differences first, products second: the small differences of near-equal points keep their digits
            scales = q[block].abs().amax(1)
            weights = (q[block][:, columns] / scales[:, None]).to(device=h.device, dtype=dtype)
            delta = weights @ _points(h, columns).to(dtype).flatten(1)
            sums = delta.view(len(block), *h.shape[1:]).mul_(_points(grad, block)).sum(2)
            total += scales.to(sums) @ sums
    return total


def _points(t: Tensor, indices: list[int]) -> Tensor:
    """Points of a path, a view where they are neighbours."""
    first, last = indices[0], indices[-1]
    return t[first : last + 1] if last - first + 1 == len(indices) else t[indices]


def _flat(t: Tensor) -> Tensor:
    """(points, examples, features)"""
    return t.detach().unsqueeze(-1).flatten(2)


def _triton(h: Tensor, grad: Tensor, q: Tensor) -> Tensor:
    from cobra_kernels.conductance_reduce_triton import launch

    return launch(h, grad, q)


def _fake(h: Tensor, grad: Tensor, q: Tensor) -> Tensor:
    return h.new_empty(h.shape[1], dtype=torch.float64 if h.dtype == torch.float64 else torch.float32)


for _name, _implementation in {"cobra::conductance_reduce": _eager, "cobra::conductance_reduce_triton": _triton}.items():
    torch.library.define(_name, "(Tensor h, Tensor grad, Tensor q) -> Tensor")
    torch.library.impl(_name, "default", _implementation)
    torch.library.register_fake(_name, _fake)


def conductance_reduce(h: Tensor, grad: Tensor, q: Tensor, *, backend: Literal["torch", "triton"] = "torch") -> Tensor:
    """Attribution of one layer for each example.

    h: (m, B, ...) the layer's output at m points
    grad: (n, B, ...) the gradient of each example's F at n points
    q: (n, m), best on the CPU: another device is waited for
    backend: "triton" needs a CUDA device, and half precision or fp32; nothing else is tried where it cannot run

    out: (B,) fp32, or fp64 for fp64 inputs
    """
    if h.shape[1:] != grad.shape[1:] or h.ndim < 2 or q.shape != (len(grad), len(h)):
        raise ValueError(
            f"h {tuple(h.shape)} and grad {tuple(grad.shape)} must agree but for their points, and q {tuple(q.shape)} be "
            "(points of grad, points of h)"
        )
    operands = _flat(h), _flat(grad), q.detach()
    if backend == "torch":
        return torch.ops.cobra.conductance_reduce.default(*operands)
    if backend != "triton":
        raise ValueError(f"no backend {backend!r}; there are 'torch' and 'triton'")
    require_triton(h)
    return torch.ops.cobra.conductance_reduce_triton.default(*operands)
