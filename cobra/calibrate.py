"""Stages 1 and 2 over a calibration set."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from cobra import distributed, objective
from cobra.batch import Batch, model_device
from cobra.conductance import Attribution, attribute
from cobra.config import CHOICES, TargetModules
from cobra.directions import GradientSums, top_directions
from cobra.entry import TOKENS, Baseline, find_entry
from cobra.gradient import GradientNorms, gradient_norms
from cobra.layout import check_layout, refuse_batch_second
from cobra.linear import CobraLinear
from cobra.path import path_rule
from cobra.progress import Progress
from cobra.scores import Completeness, LayerScores
from cobra.sites import Site, blocks_of, find_sites, fingerprint, linear_names, refuse_peft_layers
from cobra.watch import frozen

CHUNK_BYTES = {"cpu": 1 << 28}  # what the allocator hands out again: the first touch of more memory costs more than is saved
PerExample = Callable[[object, object], Tensor]


def calibrate(
    model: nn.Module,
    loader: Iterable,
    *,
    steps: int = 50,
    estimator: str = "paper",
    quadrature: str = "midpoint",
    baseline: Baseline = "zero",
    granularity: str = "site",
    target: PerExample | None = None,
    loss: PerExample | None = None,
    max_examples: int = 1000,
    progress: bool = True,
    target_modules: TargetModules = "all-linear",
    chunk_bytes: int | None = None,
    directions: int = 0,
) -> LayerScores:
    """Measures contribution (path-integral conductance) and gradient demand of every linear layer. The model is unchanged.

    loader: batches as the model takes them, a mapping of tensors (with "labels") or an (inputs, labels) pair
    steps, quadrature: gradient evaluations on the path and their rule (`cobra.path.path_rule`)
    estimator: "paper" (COBRA Eq. 1), "conductance" (as captum's LayerConductance) or "direct" (complete across layers)
    baseline: "zero" or a tensor like the model's entry; where that is token embeddings, "mean" or "pad" too
    granularity: "site" scores every layer, "block" every transformer block
    target, loss: (outputs, batch) -> (batch,), what is attributed and whose gradient is taken; by default the gold-class
        logit, the output, or the mean gold-token log-probability, and the model's own loss
    max_examples: of the loader that are used, from its start; examples whose labels are all -100 do not count. Of all ranks
        together where there are several, each taking an equal share from the start of its own loader
    target_modules: as in `CobraConfig`
    chunk_bytes: activation memory the path sweep may take; 256 MiB on a CPU, where more is slower, and 1 GiB elsewhere
    directions: leading gradient directions to keep of every layer: lora_A starts along them, and prior_level="rank" needs them;
        takes the memory of the target weights in fp32 while it runs; of each that has over 2,048 rows 512, or twice as many

    Where torch.distributed is initialised, every rank calls it with a loader of its own part of the examples; all get the
    scores of all examples, those of rank 0 first.

    Raises ValueError for an empty loader, rows of a dataset in the place of batches, labels all masked or of no class, losses
    or scores that are not finite, layers whose first dimension is not the batch, and what `find_sites`, `find_entry` and
    `path_rule` raise.
    Warns of layers that are not used, of those that do not depend on the path, of a head of zeros, and of a poor quadrature.
    """
    least = {"directions": (directions, 0), "max_examples": (max_examples, 1), "chunk_bytes": (chunk_bytes, 1)}
    _check_arguments(model, granularity, least)
    sites = find_sites(model, target_modules, allow_quantised=True)
    refuse_batch_second(model, sites)
    rule = path_rule(estimator, quadrature, steps)
    target_of = _unwrapped(target) or partial(objective.default_target, model)
    loss_of = _unwrapped(loss) or partial(objective.default_loss, model)
    settings = {
        "estimator": estimator,
        "quadrature": quadrature,
        "steps": steps,
        "baseline": baseline if isinstance(baseline, str) else "tensor",
        "granularity": granularity,
    } | ({"directions": directions} if directions else {})
    of_all = distributed.share(max_examples)
    chunk = chunk_bytes or CHUNK_BYTES.get(model_device(model).type, 1 << 30)

    def measure() -> distributed.Results:
        collected = _Collected(directions)
        with frozen(model), Progress("calibrate", _examples(loader, of_all), shown=progress and not distributed.rank()) as bar:
            for index, (batch, counted) in enumerate(_batches(model, loader, of_all)):
                entry = find_entry(model, batch, baseline)
                checked = partial(_checked_loss, model, loss_of) if index == 0 and loss is None else loss_of
                sums = collected.sums if directions else None
                norms = gradient_norms(model, sites, entry, batch, checked, sums, counted)
                _check_losses(norms.losses, index)
                if index == 0:
                    check_layout(model, sites, entry, batch)
                attribution = attribute(
                    model,
                    sites,
                    entry,
                    batch,
                    rule,
                    target_of,
                    direct=estimator == "direct",
                    max_rows=max(1, int(chunk / 1.3) // max(1, norms.row_bytes)),  # the sweep holds site outputs too
                )
                collected.add(counted, norms, attribution, entry.words)
                bar.advance(batch.size)
        return collected.results({**settings, "fingerprint": fingerprint(sites)})

    collected = _Collected.of(distributed.gather_results(measure, "calibration", model_device(model)))
    scores = collected.scores(sites, settings, linear_names(model))
    if not distributed.rank():
        _warn(scores, collected.entered, [sites[i].name for i in sorted(collected.off_path)])
    return scores


def _check_arguments(model: nn.Module, granularity: str, least: dict[str, tuple[int | None, int]]) -> None:
    """least: a number and the smallest that it may be, by name"""
    if granularity not in CHOICES["granularity"]:
        raise ValueError(f"granularity={granularity!r} is not one of {', '.join(CHOICES['granularity'])}")
    for name, (value, smallest) in least.items():
        if value is not None and value < smallest:
            raise ValueError(f"{name}={value}: expected at least {smallest}")
    if any(isinstance(module, CobraLinear) for module in model.modules()):
        raise ValueError("an adapter is attached to the model; calibrate before attach(), or detach() or merge() it first")
    refuse_peft_layers(model)


class _Collected:
    """Per-example results of the batches so far."""

    def __init__(self, directions: int = 0):
        self.squared, self.attributed, self.entry, self.change = [], [], [], []
        self.called, self.varied, self.reached = frozenset(), frozenset(), frozenset()
        self.batches, self.entered = 0, ""
        self.sums = GradientSums(directions)

    @classmethod
    def of(cls, ranks: list[distributed.Results]) -> _Collected:
        """What all ranks measured, in their order."""
        collected, measured = cls(), ranks[0][1]["measured"]
        for index, (tensors, values) in enumerate(ranks):
            other = [key for key in measured if values["measured"][key] != measured[key]]
            if other:
                found = f"{other[0]}={values['measured'][other[0]]!r}, rank 0 with {measured[other[0]]!r}"
                raise ValueError(f"rank {index} calibrated with {found}; give every rank the same model and arguments")
            for name in ("squared", "attributed", "entry", "change"):
                getattr(collected, name).extend([tensors[name]] if name in tensors else [])
            for name, tensor in tensors.items():
                if name.startswith("sum."):
                    collected.sums.merge(int(name.removeprefix("sum.")), tensor)
            for name in ("called", "varied", "reached"):
                setattr(collected, name, getattr(collected, name) | frozenset(values[name]))
            collected.batches += values["batches"]
            collected.entered = collected.entered or values["entered"]
        return collected

    def results(self, measured: dict) -> distributed.Results:
        """For the other ranks; `measured`: what must be the same on all of them."""
        lists = {"squared": self.squared, "attributed": self.attributed, "entry": self.entry, "change": self.change}
        values = {name: sorted(getattr(self, name)) for name in ("called", "varied", "reached")}
        tensors = {name: torch.cat(found) for name, found in lists.items() if found}
        tensors |= {f"sum.{i}": total.cpu() for i, total in self.sums.totals.items()}
        return tensors, {**values, "batches": self.batches, "entered": self.entered, "measured": measured}

    def add(self, counted: Tensor, norms: GradientNorms, attribution: Attribution, entered: str) -> None:
        """entered: what the path runs through, in words"""
        self.squared.append(norms.squared[counted])
        self.attributed.append(attribution.sites[counted])
        self.entry.append(attribution.entry[counted])
        self.change.append(attribution.change[counted])
        self.called |= norms.called
        self.varied |= attribution.varied
        self.reached |= norms.reached | attribution.reached
        self.batches += 1
        self.entered = entered

    @property
    def off_path(self) -> frozenset[int]:
        """Sites that are used, and do not depend on the path."""
        return (self.called & self.reached) - self.varied

    def scores(self, sites: list[Site], settings: dict, among: list[str]) -> LayerScores:
        """among: the model's linear layers, for the names of blocks"""
        if not self.batches:
            raise ValueError("the calibration loader is empty: it yielded no batch")
        squared, attributed = torch.cat(self.squared), torch.cat(self.attributed)
        entry, change = torch.cat(self.entry), torch.cat(self.change)
        if not len(squared):
            raise ValueError(f"all labels of the {self.batches} calibration batches are masked (-100): nothing to score")
        unused = {s.name: "never called" for i, s in enumerate(sites) if i not in self.called}
        unused |= {s.name: "its output reaches no result" for i, s in enumerate(sites) if i in self.called - self.reached}
        used = [i for i, site in enumerate(sites) if site.name not in unused]
        if not used:
            raise ValueError(f"none of the {len(sites)} layers was used in the calibration pass: {_some(unused)}")
        for values, name in ((attributed, "conductance"), (squared, "gradient norm")):
            bad = [sites[i].name for i in used if not torch.isfinite(values[:, i]).all()]
            if bad:
                raise ValueError(f"the {name} of {_some(bad)} is not finite; calibrate in fp32 or check these layers' weights")
        groups: dict[str, list[int]] = {}
        block = blocks_of((site.name for site in sites), among)
        for i in used:
            groups.setdefault(block[sites[i].name] if settings["granularity"] == "block" else sites[i].name, []).append(i)
        grouped = torch.stack([attributed[:, g].sum(1) for g in groups.values()], 1)
        grouped_squared = torch.stack([squared[:, g].sum(1) for g in groups.values()], 1)
        residual_entry = entry - change
        residual_sites = attributed[:, used].sum(1) - change
        if settings["estimator"] == "direct":
            residual_entry = residual_sites = residual_sites + entry
        scale = change.abs().mean().item()
        relative = [(r.abs().mean().item() / scale if scale else math.inf) for r in (residual_entry, residual_sites)]
        return LayerScores(
            tuple(groups),
            tuple(tuple(sites[i].name for i in g) for g in groups.values()),
            tuple(tuple((sites[i].in_features, sites[i].out_features) for i in g) for g in groups.values()),
            grouped.abs().mean(0).float(),
            grouped_squared.mean(0).sqrt().float(),
            grouped.float(),
            Completeness(relative[0], relative[1], scale),
            unused,
            {**settings, "examples": len(squared)},
            fingerprint(sites),
            grouped_squared.sqrt().float(),
            {
                sites[i].name: top_directions(total / len(squared), settings["directions"])
                for i, total in sorted(self.sums.totals.items())
                if i in used
            },
        )


def _unwrapped(function: PerExample | None) -> Callable[[object, Batch], Tensor] | None:
    """A user's function gets the batch as the loader gave it."""
    return None if function is None else lambda outputs, batch: function(outputs, batch.values)


def _batches(model: nn.Module, loader: Iterable, max_examples: int) -> Iterator[tuple[Batch, Tensor]]:
    """Batches, and which of their examples count; the last one is cut where enough of them do."""
    left = max_examples
    for index, values in enumerate(loader):
        batch = Batch.from_loader(values, model_device(model), index)
        batch.check_batched(model, index)
        counted = objective.labelled_examples(model, batch)
        size = int((counted.long().cumsum(0) <= left).sum())
        if size:
            batch, counted = batch.rows(0, size), counted[:size]
            objective.check_classes(model, batch)
            yield batch, counted
            left -= int(counted.sum())
        if left <= 0:
            return


def _examples(loader: Iterable, max_examples: int) -> int | None:
    dataset = getattr(loader, "dataset", None)
    try:
        return min(len(dataset), max_examples)
    except TypeError:  # it streams; torch's ChainDataset has a __len__ even so
        return None


def _check_losses(losses: Tensor, index: int) -> None:
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the loss of example {bad[0]} in calibration batch {index} is {losses[bad[0]].item()}: "
            "check its inputs and labels, or load the model in fp32"
        )


def _checked_loss(model: nn.Module, loss_of: Callable[[object, Batch], Tensor], outputs: object, batch: Batch) -> Tensor:
    """The default loss, held to the model's own."""
    losses = loss_of(outputs, batch)
    if torch.isfinite(losses).all():  # others are named by `_check_losses`
        with torch.no_grad():
            objective.check_against_model(model, outputs, losses, batch)
    return losses


def _warn(scores: LayerScores, entered: str, off_path: list[str]) -> None:
    """entered: what the path runs through; off_path: names of layers that do not depend on it"""
    if scores.unused:
        warnings.warn(f"{len(scores.unused)} layers have no score and get no rank: {_some(scores.unused)}", stacklevel=3)
    if off_path:
        warnings.warn(
            f"{len(off_path)} layers do not depend on {entered}, which the path runs through: {_some(off_path)}; their "
            "contribution is 0, and fusion='product' ranks them last: fusion='sum' or 'gradient' does not",
            stacklevel=3,
        )
    if not scores.gradient.any():
        warnings.warn(
            "no gradient reaches the layers, as with a head that starts at zero: there is nothing to rank them by; fit or "
            "initialise the head first",
            stacklevel=3,
        )
    elif not scores.completeness.change:
        warnings.warn("F(x) is F(x0) for every example: what the path runs through does not move the result", stacklevel=3)
    elif scores.completeness.path > 0.05:
        remedy = _remedy(scores.settings, tokens=entered == TOKENS)
        warnings.warn(f"the path integral misses {scores.completeness.path:.0%} of F(x) - F(x0): {remedy}", stacklevel=3)


def _remedy(settings: dict, tokens: bool) -> str:
    """What may bring the residual down: nothing that the calibration had, or that its input cannot have."""
    steps = "take more steps" + ("" if settings["quadrature"] == "lobatto" else ", or quadrature='lobatto'")
    if not tokens or settings["baseline"] == "mean":
        return steps
    compare = "compare it with baseline='mean' where a model normalises its embeddings, which is singular at zero"
    return f"{compare}; otherwise {steps}"


def _some(names) -> str:
    listed = [f"{k} ({v})" for k, v in names.items()] if isinstance(names, dict) else list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
