"""The gains of the final runs once more, on the validation split: the same trained models, other examples; and how much they
have fitted of their training sets.

Learning rates were chosen on that split, on models of other seeds. Intervals are over seeds, with the examples as given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from bench.accuracy.cells import BASELINE, METRIC, Place, Runs, higher_is_better
from bench.accuracy.intervals import Estimate, mean_of, relative, seeds_estimate
from bench.accuracy.statistics import Summary

PENALISED = "adalora"


@dataclass(frozen=True)
class Replication:
    """Mean gains over LoRA over all tasks of a kind at one place: on test as `Summary.means` has it, and on validation.

    training: by how much the training loss is above LoRA's, mean of the ratios of all pairs of runs, less 1; higher: pairs in
        which it is above, of `pairs`. None for AdaLoRA, whose loss peft adds a penalty to
    """

    place: Place
    kind: str
    method: str
    test: Estimate
    validation: Estimate
    training: float | None
    higher: int
    pairs: int


def replications(summary: Summary) -> list[Replication]:
    """Of the methods that have a mean gain on test, in its order."""
    found = []
    for mean in summary.means:
        if mean.gain and mean.method != BASELINE:
            cells = [cell for cell in summary.cells(mean.place) if summary.kind(cell) == mean.kind]
            parts = [validation_gain(summary.runs[cell], mean.method, mean.kind) for cell in cells]
            ratios = [ratio for cell in cells for ratio in training_ratios(summary.runs[cell], mean.method)]
            training = None if mean.method == PENALISED else fmean(ratios) - 1
            fitted = training, sum(ratio > 1 for ratio in ratios), len(ratios)
            found.append(Replication(mean.place, mean.kind, mean.method, mean.gain, mean_of(parts), *fitted))
    return found


def training_ratios(runs: Mapping[str, Runs], method: str) -> list[float]:
    """Mean training loss of the last steps in LoRA's, seed by seed."""
    shared = sorted(runs[method].keys() & runs[BASELINE].keys())
    return [runs[method][seed]["train_loss"] / runs[BASELINE][seed]["train_loss"] for seed in shared]


def validation_gain(runs: Mapping[str, Runs], method: str, kind: str) -> Estimate:
    """In one cell: the difference of accuracies, or by how much the loss falls relative to LoRA's mean."""
    shared = sorted(runs[method].keys() & runs[BASELINE].keys())
    ours, theirs = (np.array([runs[name][seed]["validation"][METRIC[kind]] for seed in shared]) for name in (method, BASELINE))
    return seeds_estimate(ours - theirs if higher_is_better(kind) else -relative(ours, theirs))
