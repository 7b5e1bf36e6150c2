"""How long a run is, and how an adapter of its budget is configured."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

import cobra
from cobra import Budget
from cobra.budget import allocate
from cobra.cli.training.prepare import Subject
from cobra.cli.training.settings import AVERAGE_RANK, TrainSettings
from cobra.plan import rank_cost
from cobra.sites import blocks_of, find_sites, linear_names


def adapter_config(settings: TrainSettings, subject: Subject) -> cobra.CobraConfig:
    """The adapter's, with the whole budget; raises ValueError where it does not reach for a rank, of plain LoRA one a layer.

    Plain LoRA has in every layer the rank that the budget gives, or r_max where that is less, down to a multiple.
    """
    search = max(1, round(settings.share_of_search * number_of_steps(settings, subject)))
    plain = settings.config(0, total_steps=search)
    shapes: dict[str, list[tuple[int, int]]] = {}
    sites = find_sites(subject.model, plain.target_modules)
    block = blocks_of((site.name for site in sites), linear_names(subject.model))
    for site in sites:
        group = block[site.name] if settings.granularity == "block" else site.name
        shapes.setdefault(group, []).append((site.in_features, site.out_features))
    costs = [rank_cost(settings.unit, group) for group in shapes.values()]
    amount = AVERAGE_RANK * sum(costs) if settings.budget is None else settings.budget
    if settings.method == "cobra":
        budget = Budget(amount, settings.unit, multiple=settings.multiple, tied=settings.tied)
        _check_reaches(budget, list(shapes), costs)
        average = amount / sum(costs)
        wide = {"r_max": _wide(average, settings.multiple)} if (settings.preset, settings.r_max) == ("singular", None) else {}
        config = replace(plain, rank_budget=budget, **wide)
        ranks = (min(config.r_max, *(min(shape) for shape in group)) for group in shapes.values())
        return config.resolved(average, cut=sum(map(math.prod, zip(ranks, costs, strict=True))) > amount)
    rank, least = amount // sum(costs), settings.multiple
    if rank < least:
        ranks = "one rank" if least == 1 else f"multiple={least} ranks"
        raise ValueError(f"budget={amount} {settings.unit}: {ranks} in each of {len(costs)} layers takes {least * sum(costs)}")
    widest = settings.r_max or rank
    if widest < least:
        raise ValueError(f"r_max={widest}: every rank is a multiple of {least}; raise r_max to at least {least}")
    rank = min(rank, widest) // least * least
    ranks = sum(min(rank, *(min(shape) for shape in group)) for group in shapes.values())
    return replace(plain, rank_budget=ranks, r_max=rank)


def _check_reaches(budget: Budget, groups: list[str], costs: list[int]) -> None:
    """groups, costs: of one rank in each"""
    ones = [np.ones(budget.multiple)] * len(groups)
    least = allocate(groups, ones, costs, replace(budget, amount=0)).step
    if budget.amount < least:
        plain = budget.multiple == 1 and not budget.tied
        what = "the cheapest rank costs" if plain else "the fewest ranks that multiple and tied allow cost"
        raise ValueError(f"budget={budget.amount} {budget.unit}: {what} {least}; raise it to at least {least}")


def _wide(average: float, multiple: int) -> int:
    """Ranks of a layer before the cut in the singular basis, as measured: 8 times the average, or the 4 of budgets below it."""
    return min(1024, max(4, multiple, math.ceil(8 * average)))


def number_of_steps(settings: TrainSettings, subject: Subject) -> int:
    a_pass = math.ceil(math.ceil(len(subject.train) / settings.batch_size) / settings.accumulation)
    return settings.steps or max(1, math.ceil(settings.epochs * a_pass))
