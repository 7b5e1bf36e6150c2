"""The gains of the final runs once more, on the validation split: the same trained models, other examples.

Learning rates were chosen on that split, on models of other seeds. Intervals are over seeds, with the examples as given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bench.accuracy.cells import BASELINE, METRIC, Place, Runs, higher_is_better
from bench.accuracy.intervals import Estimate, mean_of, relative, seeds_estimate
from bench.accuracy.statistics import Summary


@dataclass(frozen=True)
class Replication:
    """Mean gains over LoRA over all tasks of a kind at one place: on test as `Summary.means` has it, and on validation."""

    place: Place
    kind: str
    method: str
    test: Estimate
    validation: Estimate


def replications(summary: Summary) -> list[Replication]:
    """Of the methods that have a mean gain on test, in its order."""
    found = []
    for mean in summary.means:
        if mean.gain and mean.method != BASELINE:
            cells = [cell for cell in summary.cells(mean.place) if summary.kind(cell) == mean.kind]
            parts = [validation_gain(summary.runs[cell], mean.method, mean.kind) for cell in cells]
            found.append(Replication(mean.place, mean.kind, mean.method, mean.gain, mean_of(parts)))
    return found


def validation_gain(runs: Mapping[str, Runs], method: str, kind: str) -> Estimate:
    """In one cell: the difference of accuracies, or by how much the loss falls relative to LoRA's mean."""
    shared = sorted(runs[method].keys() & runs[BASELINE].keys())
    ours, theirs = (np.array([runs[name][seed]["validation"][METRIC[kind]] for seed in shared]) for name in (method, BASELINE))
    return seeds_estimate(ours - theirs if higher_is_better(kind) else -relative(ours, theirs))
