"""100,000 gates under a budget: the exact selection beside a greedy one from a heap, which stops where a gate does not fit."""

from __future__ import annotations

import heapq

import torch

from cobra.budget import Budget, allocate
from cobra.timing import Comparison, compare

SHAPES = ((1000, 100), (224, 446))  # groups × gates
COSTS = {  # of one rank, over the layers of a block
    "ranks": (1,),
    "parameters, 2 costs": (1536, 1536, 1536, 1536, 3840, 3840),  # BERT-base
    "parameters, 3 costs": (8192, 5120, 5120, 8192, 18432, 18432, 18432),  # Llama 3 8B
    "parameters, 3 prime costs": (4099, 8191, 12289),
}
CONSTRAINTS = {
    "multiples of 8": {"multiple": 8},
    "tied": {"tied": ("qkv", "gate_up")},
    "tied, multiples of 8": {"multiple": 8, "tied": ("qkv", "gate_up")},
}
LAYERS = ("q", "k", "v", "o", "gate", "up", "down")


def run(rounds: int = 15) -> list[Comparison]:
    llama = COSTS["parameters, 3 costs"]
    free = [_at(*shape, kind, costs, {}, rounds) for shape in SHAPES for kind, costs in COSTS.items()]
    return free + [_at(*SHAPES[0], f"3 costs, {kind}", llama, constraints, rounds) for kind, constraints in CONSTRAINTS.items()]


def _at(groups: int, gates: int, kind: str, costs: tuple[int, ...], constraints: dict, rounds: int) -> Comparison:
    names = [f"layers.{g // len(LAYERS)}.{LAYERS[g % len(LAYERS)]}_proj" for g in range(groups)]
    values = list(torch.rand(groups, gates, dtype=torch.float64))
    cost = [costs[g % len(costs)] for g in range(groups)]
    budget = Budget(sum(cost) * gates * 3 // 8, "parameters" if len(costs) > 1 else "ranks", **constraints)

    def exact() -> float:
        found = allocate(names, values, cost, budget)
        return sum(v[list(kept)].sum().item() * c for v, kept, c in zip(values, found.kept, cost, strict=True))

    alternatives = {"exact": lambda: allocate(names, values, cost, budget)}
    if not constraints:  # the heap knows none
        alternatives["heap"] = lambda: greedy(values, cost, budget.amount)
        if exact() < greedy(values, cost, budget.amount) * (1 - 1e-12):
            raise AssertionError(f"{kind}: the exact selection is worth less than the greedy one; no speed is reported for it")
    return compare(f"{groups} × {gates} gates, {kind}", "exact", alternatives, rounds, warmup=1)


def greedy(values: list[torch.Tensor], costs: list[int], amount: int) -> float:
    """The worth of the best gates one by one, until one no longer fits."""
    groups = [sorted(v.tolist(), reverse=True) for v in values]
    heap = [(-group[0], g) for g, group in enumerate(groups)]
    heapq.heapify(heap)
    taken, worth = [0] * len(groups), 0.0
    while heap:
        value, g = heap[0]
        if costs[g] > amount:
            break
        amount, worth, taken[g] = amount - costs[g], worth - value * costs[g], taken[g] + 1
        if taken[g] < len(groups[g]):
            heapq.heapreplace(heap, (-groups[g][taken[g]], g))
        else:
            heapq.heappop(heap)
    return worth
