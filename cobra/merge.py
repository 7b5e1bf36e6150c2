"""Folding an adapter into plain weights and back, and the report of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cobra.linear import CobraLinear
from cobra.sites import Site, linear_weight
from cobra_kernels import merge_lora


@dataclass(frozen=True)
class SiteReport:
    """delta_norm: ‖ΔW‖, weight_norm: ‖W‖ (Frobenius); rounding_loss: ‖(W' - W) - ΔW‖ / ‖ΔW‖, what the weight's dtype lost."""

    name: str
    rank: int
    delta_norm: float
    weight_norm: float
    rounding_loss: float


@dataclass(frozen=True)
class MergeReport:
    """One entry a merged layer."""

    sites: tuple[SiteReport, ...]

    @property
    def worst_rounding_loss(self) -> float:
        return max((site.rounding_loss for site in self.sites), default=0.0)

    def table(self) -> str:
        width = max([len(s.name) for s in self.sites] + [5])
        lines = [f"{'site':<{width}}  rank  |update|/|weight|  lost to rounding"]
        lines += [
            f"{s.name:<{width}}  {s.rank:>4}  {s.delta_norm / max(s.weight_norm, 1e-30):>17.2e}  {s.rounding_loss:>16.1e}"
            for s in self.sites
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"MergeReport({len(self.sites)} layers, at most {self.worst_rounding_loss:.1e} of an update lost to rounding)"


@dataclass(frozen=True)
class MergedSite:
    """A merged layer and the way back. `original` is the base weight as stored."""

    original: Tensor
    report: SiteReport

    def restore(self, site: Site) -> None:
        site.module.weight.data.copy_(self.original)


@torch.no_grad()
def merge_site(site: Site, layer: CobraLinear) -> MergedSite:
    """Writes W + s (B ∘ z) A into the base module's weight. Raises ValueError where the sum is not finite."""
    weight, original = site.module.weight, site.module.weight.detach().clone()
    base = linear_weight(site.module)
    lora_A, lora_B = layer.folded()
    merged = merge_lora(base, lora_A, lora_B)
    report = _report(site.name, base, merged, lora_A, lora_B)
    if not math.isfinite(report.rounding_loss):
        raise ValueError(
            f"{site.name}: the merged weight is not finite ({weight.dtype}); the adapter or the weight holds NaN or Inf"
        )
    weight.data.copy_(merged.t() if layer.transposed else merged)
    return MergedSite(original, report)


def _report(name: str, base: Tensor, merged: Tensor, lora_A: Tensor, lora_B: Tensor) -> SiteReport:
    # ‖B A‖² = ⟨Bᵀ B, A Aᵀ⟩ needs no (N, K) product
    gram_A, gram_B = (lora_A @ lora_A.t()).cpu().double(), (lora_B.t() @ lora_B).cpu().double()
    delta_norm = (gram_A * gram_B).sum().clamp(min=0).sqrt().item()
    lost = merged.to(lora_B.dtype) - base.to(lora_B.dtype)
    lost = lost.addmm_(lora_B, lora_A, alpha=-1).norm().item()
    relative = lost / delta_norm if delta_norm else lost
    return SiteReport(name, lora_A.shape[0], delta_norm, base.norm().item(), relative)
