"""Stage 1: what every layer contributes along the path from the baseline to the input, all sites in one sweep.

The points of the path are folded into the batch; one forward and one backward give every site's outputs h and gradients, which
are reduced to one number per example as each gradient arrives (`cobra_kernels.conductance_reduce`). Nothing of a site is kept
after that, so memory stays that of a training step on the folded batch; the batch is split to stay under a row limit.
Where a rule takes gradients between the ends of the path and outputs at the ends (COBRA Eq. 1), the ends have no backward.

For "direct", each site's output is a fresh leaf: its gradient then counts only the ways to F that pass no further site.
By the chain rule dF/dα = Σ_sites ⟨direct gradient, dh/dα⟩ + (the way that passes no site), so the sum over sites and that
bypass is complete: F(x) - F(x0). Only layers that write to the residual stream have direct ways; the rest score 0.
"""

from __future__ import annotations

from collections import Counter
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
    varied: sites whose output depends on the path
    reached: sites that a gradient reached
    """

    sites: Tensor
    entry: Tensor
    change: Tensor
    varied: frozenset[int]
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
    between = rule.between_ends()
    points = len((between or rule).alphas)
    examples = max(1, max_rows // max(2, points))
    total = torch.zeros(batch.size, len(sites) + 1, dtype=torch.float64, device="cpu")
    change = torch.zeros(batch.size, dtype=torch.float64, device="cpu")
    varied: set[int] = set()
    reached: set[int] = set()
    for start in range(0, batch.size, examples):
        part = batch.rows(start, start + examples)
        rows = slice(start, start + part.size)
        ends = _Ends(sites, part.size, copy=writes_in_place(model)) if between else None
        change[rows] = _end_difference(model, entry, part, target, ends)
        for chunk in _chunks(rule, between, max_rows if examples == 1 else points):
            sums, watched = _sweep(model, sites, entry, part, chunk, target, direct, ends)
            varied |= watched
            reached |= sums.keys()
            for index, values in sums.items():
                total[rows, index] += values.cpu().double()
    return Attribution(total[:, :ENTRY], total[:, ENTRY], change, frozenset(varied - {ENTRY}), frozenset(reached - {ENTRY}))


def _chunks(rule: PathRule, between: PathRule | None, points: int) -> list[PathRule]:
    if between is None:
        return rule.chunks(max(3, points))
    return [PathRule(*part) for part in zip(between.alphas.split(points), between.q.split(points), strict=True)]


class _Ends:
    """Outputs of the sites at both ends of the path, by site and number of its call."""

    def __init__(self, sites: Sequence[Site], examples: int, copy: bool):
        self.sites, self._examples, self._copy = sites, examples, copy
        self._calls: Counter[int] = Counter()
        self._snapshots: dict[tuple[int, int], Snapshot] = {}
        self._outputs: dict[tuple[int, int], Tensor] = {}

    def keep(self, index: int, h: Tensor) -> None:
        self._snapshots[index, self._calls[index]] = Snapshot(h, _what(self.sites, index), self._copy)
        self._calls[index] += 1

    def settle(self) -> None:
        """Raises RuntimeError where the forward overwrote what was kept."""
        self._outputs = {key: snapshot.take() for key, snapshot in self._snapshots.items()}
        self._snapshots.clear()

    def output(self, index: int, call: int) -> Tensor:
        """(2, examples, ...)"""
        h = self._outputs.get((index, call))
        if h is None or h.shape[0] % (2 * self._examples):
            raise ValueError(
                f"the {_what(self.sites, index)} has no like at both ends of the path: whether it is called depends on values; "
                "leave it out with target_modules"
            )
        return h.reshape(2, self._examples, -1)


def _what(sites: Sequence[Site], index: int) -> str:
    return "input" if index == ENTRY else f"output of {sites[index].name}"


def evaluate_target(target: Target, outputs: object, batch: Batch) -> Tensor:
    """F of every example. Raises ValueError where the target does not give one number per example."""
    values = target(outputs, batch)
    if not isinstance(values, Tensor) or values.shape != (batch.size,):
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"target must return one value per example, shape ({batch.size},); it returned {found}")
    return values


@torch.no_grad()
def _end_difference(model: nn.Module, entry: Entry, batch: Batch, target: Target, ends: _Ends | None) -> Tensor:
    """F(x) - F(x0) of every example; `ends` is filled on the way."""
    keep = ends.keep if ends else lambda index, h: None
    watched, both = watching(ends.sites if ends else (), lambda index, x, h: keep(index, h)), torch.tensor([0.0, 1.0])
    with watched, entry.at(batch, both, lambda x: keep(ENTRY, x)) as folded:
        values = evaluate_target(target, folded.forward(model), folded).cpu().double()
    if ends:
        ends.settle()
    return values[batch.size :] - values[: batch.size]


def _sweep(
    model: nn.Module,
    sites: Sequence[Site],
    entry: Entry,
    batch: Batch,
    rule: PathRule,
    target: Target,
    direct: bool,
    ends: _Ends | None,
) -> tuple[dict[int, Tensor], set[int]]:
    """One forward and one backward over all points of the rule: site index -> (B,), and the sites that depend on the path."""
    points, rows = len(rule.alphas), len(rule.alphas) * batch.size
    copy = writes_in_place(model)
    sums: dict[int, Tensor] = {}
    calls: Counter[int] = Counter()
    varied: set[int] = set()

    def watch(index: int, h: Tensor, call: int) -> None:
        snapshot = None if ends else Snapshot(h, _what(sites, index), copy)
        varied.add(index)

        def reduce(grad: Tensor) -> None:
            h = ends.output(index, call) if ends else snapshot.take().reshape(points, batch.size, -1)
            values = conductance_reduce(h, grad.reshape(points, batch.size, -1), rule.q)
            sums[index] = sums[index] + values if index in sums else values

        h.register_hook(reduce)
        if h.is_leaf:
            h.register_post_accumulate_grad_hook(_drop_grad)

    def on_call(index: int, x: Tensor, h: Tensor) -> Tensor | None:
        call = calls[index]
        calls[index] += 1
        if not h.requires_grad:
            return None  # it does not change along the path
        per_example(h, rows, sites[index].name)
        if direct:
            leaf = h.detach().requires_grad_()
            watch(index, leaf, call)
            return leaf.clone()  # a model may write into it, which a leaf forbids
        watch(index, h, call)
        return None

    def on_entry(x: Tensor) -> None:
        watch(ENTRY, x, calls[ENTRY])
        calls[ENTRY] += 1

    with watching(sites, on_call), entry.at(batch, rule.alphas, on_entry) as folded:
        values = evaluate_target(target, folded.forward(model), folded)
        if not values.requires_grad:
            raise ValueError("the target does not depend on the model's input: no gradient to attribute")
        values.sum().backward()
    return sums, varied


def _drop_grad(leaf: Tensor) -> None:
    leaf.grad = None
