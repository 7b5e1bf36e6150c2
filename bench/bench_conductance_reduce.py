"""The reduction of a layer's changes and gradients to one number an example, beside plain torch and one pass over them."""

from __future__ import annotations

import torch
from torch import Tensor

from cobra.path import path_rule
from cobra.timing import Comparison, compare
from cobra_kernels import conductance_reduce, conductance_reduce_ref
from cobra_kernels.testing import assert_within_budget

EXAMPLES, TOKENS = 6, 64
RULES = {"Eq. 1, 10 points": ("paper", "midpoint", 10), "conductance, 10 points": ("conductance", "midpoint", 10)}
RULES |= {"Lobatto, 9 points": ("conductance", "lobatto", 9)}


def run(rounds: int = 25) -> list[Comparison]:
    return [
        _at(rule, features, dtype, rounds)
        for rule in RULES
        for features, dtype in ((384, torch.float32), (1536, torch.float32), (1536, torch.bfloat16))
    ]


def _at(name: str, features: int, dtype: torch.dtype, rounds: int) -> Comparison:
    q = path_rule(*RULES[name]).q
    rows, columns = (torch.nonzero(q.abs().sum(axis)).flatten().tolist() for axis in (1, 0))
    generator = torch.Generator().manual_seed(0)
    h, grad = torch.randn(2, len(q), EXAMPLES, TOKENS, features, generator=generator).to(dtype)
    read = sum(t[used].numel() * t.element_size() for t, used in ((h, columns), (grad, rows)))
    oracle = conductance_reduce_ref(h.double(), grad.double(), q)
    assert_within_budget(conductance_reduce(h, grad, q), conductance_reduce_ref(h, grad, q), oracle)
    used = [h[columns[0] : columns[-1] + 1 : max(1, columns[1] - columns[0])], grad[rows[0] : rows[-1] + 1]]

    def one_pass() -> list[Tensor]:
        return [t.sum(dtype=torch.float32) for t in used]

    def point_by_point() -> Tensor:
        """As it is written by hand: differences, products and sums of whole tensors."""
        weights = q.to(torch.float32)
        total = torch.zeros(EXAMPLES)
        for i in rows:
            delta = sum(weights[i, j] * h[j].float() for j in q[i].nonzero().flatten().tolist())
            total += (delta * grad[i].float()).flatten(1).sum(1)
        return total

    alternatives = {
        "torch's sum of the same numbers": one_pass,
        "cobra": lambda: conductance_reduce(h, grad, q),
        "plain torch, one einsum": lambda: conductance_reduce_ref(h, grad, q),
        "plain torch, a point at a time": point_by_point,
        "torch.compile of it": torch.compile(point_by_point),
    }
    size = f"{EXAMPLES} × {TOKENS} × {features} {str(dtype).removeprefix('torch.')}"
    work, yardstick = f"conductance_reduce, {name}, {size}, {read / 1e6:.0f} MB", "torch's sum of the same numbers"
    return compare(work, yardstick, alternatives, rounds, amount=read, unit="B")
