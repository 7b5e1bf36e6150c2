"""Where in a layer's input a low-rank update helps most: the leading right singular vectors of the mean gradient.

To first order the loss falls fastest along them, for one rank of an update as for r (Eckart and Young), so they are the best
rows that lora_A can start from (LoRA-GA, Wang et al. 2024), and their singular values say what each further rank is worth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cobra_kernels.precision import full_precision

EXACT = 2048  # output features up to which the gradient is summed whole
SKETCH = 512  # rows that stand for more of them, at least
ROUNDING = 1e-6  # of the largest singular value; what is below is the sums' rounding in fp32, not a direction


class GradientSums:
    """Sums over examples of every site's gradient ∇_W L (N, K), on the device of its tensors.

    Of wide layers only Ω ∇_W L is summed, Ω (rows, N) Gaussian with E[ΩᵀΩ] = 1: its right singular vectors and values are near
    the gradient's, and a model's sums take a fraction of its weights' memory.

    directions: that will be asked for; a sketch has twice as many rows
    """

    def __init__(self, directions: int = 0):
        self.rows = max(SKETCH, 2 * directions)
        self.totals: dict[int, Tensor] = {}
        self._sketches: dict[tuple[int, torch.device], Tensor] = {}

    def add(self, site: int, x: Tensor, grad: Tensor) -> None:
        """x: (B, T, K) inputs, grad: (B, T, N) gradients of the outputs"""
        with full_precision(x.device):
            self._add(site, x.flatten(0, 1).float(), grad.flatten(0, 1).float())

    def _add(self, site: int, x: Tensor, grad: Tensor) -> None:
        if grad.shape[1] > max(EXACT, self.rows):
            grad = grad @ self._sketch(grad.shape[1], grad.device)
        if site not in self.totals:
            self.totals[site] = torch.zeros(grad.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
        self.totals[site].addmm_(grad.t(), x)

    def merge(self, site: int, total: Tensor) -> None:
        """Adds what another process summed."""
        self.totals[site] = self.totals[site] + total if site in self.totals else total

    def _sketch(self, features: int, device: torch.device) -> Tensor:
        key = features, device
        if key not in self._sketches:
            generator = torch.Generator("cpu").manual_seed(features)
            drawn = torch.randn(features, self.rows, generator=generator, dtype=torch.float32, device="cpu")
            self._sketches[key] = drawn.to(device) * self.rows**-0.5
        return self._sketches[key]


def top_directions(gradient: Tensor, count: int) -> Tensor:
    """The leading right singular vectors, each times its singular value.

    gradient: (N, K) -> (min(count, N, K), K) fp32, the strongest first, each row's largest element positive; rows beyond the
        gradient's rank are 0
    """
    G = gradient.double()
    N, K = G.shape
    values, vectors = torch.linalg.eigh(G @ G.t() if N < K else G.t() @ G)
    leading, strengths = vectors.flip(1)[:, :count], values.flip(0)[:count, None].clamp(min=0).sqrt()
    rows = leading.t() @ G if N < K else strengths * leading.t()
    peak = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    signed = rows * torch.where(peak < 0, -1.0, 1.0)
    return torch.where(strengths > ROUNDING * strengths[:1], signed, 0.0).float()
