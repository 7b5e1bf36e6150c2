"""Which ranks a trained adapter keeps: gates by their posterior, or singular directions of the updates by their energy.

A pure function of the adapter's groups: nothing is cut here (`cobra.shrink` does that).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cobra.budget import Budget, allocate
from cobra.config import CobraConfig
from cobra.distributed import whole
from cobra.group import Group, cost_of_rank
from cobra.plan import RankPlan, SitePlan, provenance, rank_cost
from cobra.singular import singular_directions


def select_ranks(groups: Sequence[Group], config: CobraConfig, budget: Budget, fingerprint: str, step: int) -> RankPlan:
    """The ranks that are worth most within the budget (`cobra.budget.allocate`), as a plan.

    fingerprint: of the base model; step: optimizer steps so far, for the plan's provenance

    Raises ValueError for a budget out of range, and gates or updates that are not finite.
    """
    logits = [_logits(group) for group in groups]
    posteriors = [_posterior(group, gates) for group, gates in zip(groups, logits, strict=True)]
    values, energies, source = posteriors, [()] * len(groups), "gates"
    found = [_energy(group) for group in groups] if config.basis == "singular" else []
    if any(energy.any() for energy in found):  # before the first step all updates are zero
        values, energies, source, logits = found, [tuple(energy.tolist()) for energy in found], "singular", None
        budget = replace(budget, objective="count")  # an energy is what a direction is worth, wherever it sits
    costs = [cost_of_rank(group.sites, budget.unit, group.layers[0][0].lora_A.element_size()) for group in groups]
    allocation = allocate([group.name for group in groups], values, costs, budget, finer=logits)
    sites = tuple(
        SitePlan(group.name, group.members, rank_cost("parameters", group.shapes), tuple(kept), tuple(p.tolist()), energy)
        for group, kept, p, energy in zip(groups, allocation.kept, posteriors, energies, strict=True)
    )
    fold = "one" if config.gate == "open" else config.fold
    return RankPlan(sites, fold, fingerprint, {**provenance(source, budget, allocation), "step": step})


def _logits(group: Group) -> Tensor:
    """(r,) fp64 of every gate; of open ones their prior's. They differ where above 37 the probabilities are 1 alike."""
    gate = group.gate
    return torch.tensor(group.prior, dtype=torch.float64) if gate is None else whole(gate).detach().double().cpu()


def _posterior(group: Group, logits: Tensor) -> Tensor:
    """(r,) fp64 probability of every gate."""
    posterior = logits.sigmoid()
    if not posterior.isfinite().all():
        raise ValueError(f"{group.name}: gates are not finite: the training diverged; lower the learning rate")
    return posterior


def _energy(group: Group) -> Tensor:
    """(r,) fp64 of the k-th singular directions of all layers of the group."""
    try:
        return sum(singular_directions(layers[0]).energy.cpu() for layers in group.layers)
    except ValueError as error:
        raise ValueError(f"{group.name}: {error}") from error
