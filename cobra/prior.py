"""From the two factors to the prior: pi over groups of gates, and the prior logit of each group.

    phi~ = phi / Σ phi     Gamma~ = Gamma / Σ Gamma     Psi = phi~ Gamma~     pi = Psi / Σ Psi          COBRA Eq. (2)
    logit rho = gamma (pi - mean pi)                                                                  COBRA Eq. (3)

With pi summing to 1 over many groups, pi - mean pi is small and the literal prior nearly flat (24 groups, gamma 5: rho from
0.45 to 0.69); "standardized" divides the difference by its standard deviation first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fuse(conductance: Tensor, gradient: Tensor, fusion: str = "product") -> Tensor:
    """pi of every group.

    conductance, gradient: (G,) non-negative
    fusion: "product", "sum", "contribution" (phi alone) or "gradient" (Gamma alone)

    out: (G,) fp64, sums to 1

    Raises ValueError for factors that are not finite and non-negative, or all zero where the fusion needs them.
    """
    phi, gamma = _share(conductance, "conductance"), _share(gradient, "gradient")
    factors = {"product": (phi, gamma), "sum": (phi, gamma), "contribution": (phi,), "gradient": (gamma,)}
    if fusion not in factors:
        raise ValueError(f"fusion={fusion!r} is not one of {', '.join(factors)}")
    needed = torch.stack(factors[fusion])
    psi = needed.sum(0) if fusion == "sum" else needed.prod(0)
    if not psi.sum() > 0:
        raise ValueError(f"fusion={fusion!r} leaves no group with weight: the factors are zero everywhere they meet")
    return psi / psi.sum()


def prior_logits(pi: Tensor, gamma: float, scale: str = "literal") -> Tensor:
    """logit rho of every group.

    pi: (G,)
    scale: "literal", "standardized" (differences over their standard deviation), or "log" (differences of log pi)

    out: (G,) fp64
    """
    values = pi.double()
    if scale == "log":
        values = values.clamp(min=values[values > 0].min()).log()  # a group of no weight counts as the least one
    centred = values - values.mean()
    if scale == "standardized":
        spread = centred.square().mean().sqrt()
        centred = centred / spread if spread > 1e-9 * values.abs().max() else centred  # equal groups differ by rounding only
    return gamma * centred


def _share(values: Tensor, name: str) -> Tensor:
    values = values.double()
    if not (torch.isfinite(values).all() and (values >= 0).all()):
        raise ValueError(f"{name} must be finite and non-negative")
    total = values.sum()
    return values / total if total > 0 else values
