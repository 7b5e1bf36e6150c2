"""Gates and KL of a whole model (36 sites of 16 gates), forward and backward: one call beside a call a layer."""

from __future__ import annotations

import torch
from torch.distributions import Bernoulli, kl_divergence

from cobra.timing import Comparison, compare
from cobra_kernels import gate_kl, sample_gates

SITES, RANKS, TEMPERATURE = 36, 16, 0.5


def run(rounds: int = 200) -> list[Comparison]:
    logits = torch.randn(SITES, RANKS, requires_grad=True)
    prior = torch.zeros(SITES, RANKS)
    layers = [row.clone().detach().requires_grad_() for row in logits]

    def together() -> None:
        z = sample_gates(logits, seed=1, step=7, temperature=TEMPERATURE)
        (z.sum() + gate_kl(logits, prior).sum()).backward()
        logits.grad = None

    def layer_by_layer() -> None:
        total = 0.0
        for layer in layers:
            u = torch.rand(RANKS).clamp(1e-6, 1 - 1e-6)
            z = torch.sigmoid((layer + u.log() - (1 - u).log()) / TEMPERATURE)
            total = total + z.sum() + kl_divergence(Bernoulli(logits=layer), Bernoulli(logits=prior[0])).sum()
        total.backward()
        for layer in layers:
            layer.grad = None

    alternatives = {"all sites at once": together, "a layer at a time": layer_by_layer}
    return [compare(f"gates + KL, {SITES} × {RANKS}", "all sites at once", alternatives, rounds)]
