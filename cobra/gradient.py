"""Stage 2: how much every layer wants to change, ‖∇_W L(x, y)‖² of each example, from one batched backward.

Each site's input and output gradient meet as the gradient arrives and are reduced to one number per example by
`cobra_kernels.ghost_grad_norm`; weights need no requires_grad. A weight used several times in one forward has the sum of its
uses as gradient, so its uses are joined along the tokens first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cobra.batch import Batch
from cobra.directions import GradientSums
from cobra.entry import Entry
from cobra.sites import Site
from cobra.watch import SavedBytes, Snapshot, per_example, watching, writes_in_place
from cobra_kernels import ghost_grad_norm

Loss = Callable[[object, Batch], Tensor]


@dataclass(frozen=True)
class GradientNorms:
    """What one batch yields.

    squared: (B, S) squared Frobenius norms, fp64
    losses: (B,)
    called, reached: sites that the forward called, and those that a gradient reached
    row_bytes: bytes that an example's forward leaves for the backward
    """

    squared: Tensor
    losses: Tensor
    called: frozenset[int]
    reached: frozenset[int]
    row_bytes: int


def gradient_norms(
    model: nn.Module,
    sites: Sequence[Site],
    entry: Entry,
    batch: Batch,
    loss: Loss,
    sums: GradientSums | None = None,
    counted: Tensor | None = None,
) -> GradientNorms:
    """Per-example gradient norms of one batch; the model must be frozen (`cobra.watch.frozen`).

    loss: (outputs, batch) -> (batch,)
    sums: to which the batch's gradients ∇_W Σ L are added
    counted: (B,) bool, the examples that are measured, None for all; norms of the others are 0
    """
    counted = torch.ones(batch.size, dtype=torch.bool) if counted is None else counted
    try:
        return _batched(model, sites, entry, batch, loss, sums, counted)
    except _UsedOnSharedInput:
        rows = [(batch.rows(i, i + 1), counted[i : i + 1]) for i in range(batch.size)]
        return _joined([_batched(model, sites, entry, row, loss, sums, counts) for row, counts in rows])


class _UsedOnSharedInput(Exception):
    """A site works on what all examples share (relative positions): its gradient cannot be told apart in a batch."""


def _batched(
    model: nn.Module,
    sites: Sequence[Site],
    entry: Entry,
    batch: Batch,
    loss: Loss,
    sums: GradientSums | None,
    counted: Tensor,
) -> GradientNorms:
    copy = writes_in_place(model)
    calls: dict[int, int] = {}
    arrived: dict[int, list[tuple[Tensor, Tensor]]] = {}
    squared = torch.zeros(batch.size, len(sites), dtype=torch.float64, device="cpu")

    def on_call(index: int, x: Tensor, h: Tensor) -> Tensor:
        name = sites[index].name
        calls[index] = calls.get(index, 0) + 1
        if not h.requires_grad:
            if batch.size > 1:
                raise _UsedOnSharedInput
            leaf = h.detach().requires_grad_()
            h = leaf.clone()  # a model may write into it, which a leaf forbids
        snapshot = Snapshot(x, f"input of {name}", copy)

        def arrive(grad: Tensor) -> None:
            pair = per_example(snapshot.take(), batch.size, name), per_example(grad.detach(), batch.size, name)
            arrived.setdefault(index, []).append(pair)
            if sums is not None:
                sums.add(index, *pair)
            if len(arrived[index]) == calls[index]:
                squared[:, index] = _joined_norm(arrived.pop(index)).cpu().double()
                reached.add(index)

        h.register_hook(arrive)
        return h

    reached: set[int] = set()
    with watching(sites, on_call), entry.at(batch, None, lambda x: None) as entered:
        with SavedBytes(model) as saved:
            outputs = entered.forward(model)
        losses = loss(outputs, entered)
        if not isinstance(losses, Tensor) or losses.shape != (batch.size,):
            found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"loss must return one value per example, shape ({batch.size},); it returned {found}")
        if losses.requires_grad and torch.isfinite(losses).all():
            losses[counted.to(losses.device)].sum().backward()
    # a use whose output goes nowhere leaves its site waiting: what did arrive is the whole gradient
    for index, pairs in arrived.items():
        squared[:, index] = _joined_norm(pairs).cpu().double()
        reached.add(index)
    return GradientNorms(squared, losses.detach(), frozenset(calls), frozenset(reached), saved.total // batch.size)


def _joined(parts: list[GradientNorms]) -> GradientNorms:
    return GradientNorms(
        torch.cat([part.squared for part in parts]),
        torch.cat([part.losses for part in parts]),
        frozenset().union(*(part.called for part in parts)),
        frozenset().union(*(part.reached for part in parts)),
        max(part.row_bytes for part in parts),
    )


def _joined_norm(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    xs, grads = zip(*pairs, strict=True)
    return ghost_grad_norm(torch.cat(xs, 1), torch.cat(grads, 1)) if len(pairs) > 1 else ghost_grad_norm(*pairs[0])
