"""Stage 1: what every layer contributes along the path from the baseline to the input, all sites in one sweep.

The points of the path are folded into the batch; one forward and one backward give every site's outputs h and gradients, which
are reduced to one number per example as each gradient arrives (`cobra_kernels.conductance_reduce`). Nothing of a site is kept
after that, so memory stays that of a training step on the folded batch; the batch is split to stay under a row limit.

For "direct", each site's output is a fresh leaf: its gradient then counts only the ways to F that pass no further site.
By the chain rule dF/dα = Σ_sites ⟨direct gradient, dh/dα⟩ + (the way that passes no site), so the sum over sites and that
bypass is complete: F(x) - F(x0). Only layers that write to the residual stream have direct ways; the rest score 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cobra.batch import Batch
from cobra.entry import Entry
from cobra.path import PathRule
from cobra.sites import Site
from cobra.watch import Snapshot, per_example, watching, writes_in_place
from cobra_kernels import conductance_reduce

Target = Callable[[object, Batch], Tensor]
ENTRY = -1


@dataclass(frozen=True)
class Attribution:
    """What one batch yields.

    sites: (B, S) signed attribution of every site, fp64
    entry: (B,) the same sum at the entry: all of F(x) - F(x0), but for the quadrature; the bypass for "direct"
    change: (B,) F(x) - F(x0)
    reached: sites that a gradient reached
    """

    sites: Tensor
    entry: Tensor
    change: Tensor
    reached: frozenset[int]


def attribute(
    model: nn.Module,
    sites: Sequence[Site],
    entry: Entry,
    batch: Batch,
    rule: PathRule,
    target: Target,
    *,
    direct: bool = False,
    max_rows: int = 1 << 20,
) -> Attribution:
    """Attributions of one batch; the model must be frozen (`cobra.watch.frozen`).

    target: (outputs, batch) -> (batch,)
    max_rows: rows of the folded batch at a time
    """
    examples = max(1, max_rows // len(rule.alphas))
    chunks = rule.chunks(max(3, max_rows)) if examples == 1 else [rule]
    total = torch.zeros(batch.size, len(sites) + 1, dtype=torch.float64)
    change = torch.zeros(batch.size, dtype=torch.float64, device="cpu")
    reached: set[int] = set()
    for start in range(0, batch.size, examples):
        part = batch.rows(start, start + examples)
        rows = slice(start, start + part.size)
        change[rows] = _end_difference(model, entry, part, target)
        for chunk in chunks:
            sums = _sweep(model, sites, entry, part, chunk, target, direct)
            reached |= sums.keys()
            for index, values in sums.items():
                total[rows, index] += values.cpu().double()
    return Attribution(total[:, :ENTRY], total[:, ENTRY], change, frozenset(reached - {ENTRY}))


def evaluate_target(target: Target, outputs: object, batch: Batch) -> Tensor:
    """F of every example. Raises ValueError where the target does not give one number per example."""
    values = target(outputs, batch)
    if not isinstance(values, Tensor) or values.shape != (batch.size,):
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"target must return one value per example, shape ({batch.size},); it returned {found}")
    return values


@torch.no_grad()
def _end_difference(model: nn.Module, entry: Entry, batch: Batch, target: Target) -> Tensor:
    with entry.at(batch, torch.tensor([0.0, 1.0]), lambda x: None) as folded:
        ends = evaluate_target(target, folded.forward(model), folded).cpu().double()
    return ends[batch.size :] - ends[: batch.size]


def _sweep(
    model: nn.Module, sites: Sequence[Site], entry: Entry, batch: Batch, rule: PathRule, target: Target, direct: bool
) -> dict[int, Tensor]:
    """One forward and one backward over all points of the rule: site index -> (B,)."""
    points, rows = len(rule.alphas), len(rule.alphas) * batch.size
    copy = writes_in_place(model)
    sums: dict[int, Tensor] = {}

    def watch(index: int, h: Tensor) -> None:
        what = "input" if index == ENTRY else f"output of {sites[index].name}"
        snapshot = Snapshot(h, what, copy)

        def reduce(grad: Tensor) -> None:
            h, g = (t.reshape(points, batch.size, -1) for t in (snapshot.take(), grad))
            values = conductance_reduce(h, g, rule.q)
            sums[index] = sums[index] + values if index in sums else values

        h.register_hook(reduce)
        if h.is_leaf:
            h.register_post_accumulate_grad_hook(_drop_grad)

    def on_call(index: int, x: Tensor, h: Tensor) -> Tensor | None:
        if not h.requires_grad:
            return None  # it does not change along the path
        per_example(h, rows, sites[index].name)
        if direct:
            leaf = h.detach().requires_grad_()
            watch(index, leaf)
            return leaf.clone()  # a model may write into it, which a leaf forbids
        watch(index, h)
        return None

    with watching(sites, on_call), entry.at(batch, rule.alphas, lambda x: watch(ENTRY, x)) as folded:
        values = evaluate_target(target, folded.forward(model), folded)
        if not values.requires_grad:
            raise ValueError("the target does not depend on the model's input: no gradient to attribute")
        values.sum().backward()
    return sums


def _drop_grad(leaf: Tensor) -> None:
    leaf.grad = None
