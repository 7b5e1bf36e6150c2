"""NLL, ECE and Brier score beside LoRA's, over all classification tasks of a place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bench.accuracy.cells import BASELINE, Cell, Place, family_of
from bench.accuracy.intervals import Estimate, holm, mean_of, seeds_estimate
from bench.accuracy.statistics import Summary

METRICS = {"nll": "NLL", "ece": "ECE", "brier": "Brier"}


@dataclass(frozen=True)
class CalibrationChange:
    """Mean over tasks of the paired differences to LoRA, seed by seed on the same test examples; negative is better.

    corrected: Holm's p over all metrics and places of the method's family
    """

    place: Place
    method: str
    metric: str
    tasks: int
    change: Estimate
    corrected: float


def calibration_changes(summary: Summary, metrics: Mapping[str, str] = METRICS) -> list[CalibrationChange]:
    """Of methods that have two seeds or more with LoRA on every classification task of the place.

    metrics: names in a row's test results; runs without them do not count
    """
    found = []
    for place in summary.places():
        cells = [cell for cell in summary.cells(place) if summary.kind(cell) == "classification"]
        for method in summary.methods(cells) if cells else ():
            shared = [_shared(summary, cell, method, metrics) for cell in cells]
            if method != BASELINE and min(map(len, shared)) > 1:
                for metric in metrics:
                    pairs = zip(cells, shared, strict=True)
                    change = mean_of([_change(summary, cell, method, metric, seeds) for cell, seeds in pairs])
                    found.append(CalibrationChange(place, method, metric, len(cells), change, float("nan")))
    return _corrected(found)


def _shared(summary: Summary, cell: Cell, method: str, metrics: Mapping[str, str]) -> list[int]:
    ours, theirs = (
        {seed for seed, row in summary.runs[cell].get(m, {}).items() if metrics.keys() <= row["test"].keys()}
        for m in (method, BASELINE)
    )
    return sorted(ours & theirs)


def _change(summary: Summary, cell: Cell, method: str, metric: str, seeds: Sequence[int]) -> Estimate:
    ours, theirs = summary.runs[cell][method], summary.runs[cell][BASELINE]
    return seeds_estimate([ours[s]["test"][metric] - theirs[s]["test"][metric] for s in seeds])


def _corrected(found: Sequence[CalibrationChange]) -> list[CalibrationChange]:
    out = list(found)
    for name in {family_of(change.method) for change in found}:
        family = [i for i, change in enumerate(found) if family_of(change.method) == name]
        for i, p in zip(family, holm([found[i].change.p for i in family]), strict=True):
            out[i] = replace(found[i], corrected=p)
    return out
