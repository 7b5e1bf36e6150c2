"""Where a model's gradient and contribution disagree, layer by layer, and how much of that the calibration can carry.

    red zone        gradient ≥ an even share and ≥ 2 × contribution: what gradient alone would over-provision
    under-served    contribution ≥ an even share and ≥ 2 × gradient: what gradient alone would leave out

COBRA's poster shows both in its Figure 3 without a threshold; these are `cobra.report.measures`'. An even share is 1 / layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from cobra import storage
from cobra.report import measures
from cobra.resampling import (
    FEWEST_LAYERS,
    UNKNOWN,
    Bounds,
    Factors,
    bounds,
    disjoint_parts,
    even_shares,
    factors_of,
    interval_over_examples,
    interval_over_layers,
    resampled_examples,
    resampled_layers,
)
from cobra.scores import LayerScores
from cobra.sites import blocks_of

KIND = "diagnosis"
SUBSET_PAIRS = 50
_MOST_NAMED = 8


@dataclass(frozen=True)
class Agreement:
    """A correlation of contribution and gradient over layers; NaN where it is not defined.

    over_examples: 95 % interval for these layers, had all examples been measured; resamples examples, both factors together
    over_layers: 95 % interval as if these layers were a sample of many; resamples layers. Unknown for fewer than 4
    """

    value: float
    over_examples: Bounds
    over_layers: Bounds


@dataclass(frozen=True)
class Layer:
    """Both factors as shares of their sums over layers, with 95 % intervals over examples.

    zone: "red", "under" (see the module) or ""
    certainty: share of the resamples of examples that put it into the same zone (or in none)
    """

    name: str
    contribution: float
    contribution_interval: Bounds
    gradient: float
    gradient_interval: Bounds
    zone: str
    certainty: float


@dataclass(frozen=True)
class Stability:
    """Spearman correlation of the layers' order between calibrations that differ in one thing: (mean, least) of the pairs.

    what: "seeds" (disjoint examples), "size" (disjoint halves or quarters of them) or "points" (of the path, same examples)
    setting: examples in each calibration, or path points
    """

    what: str
    setting: int
    pairs: int
    contribution: Bounds
    gradient: Bounds
    prior: Bounds


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    model, data: in words; a model with random weights is named as such
    contribution_range, gradient_range: largest over smallest layer; infinite where one has none
    path_residual: of the path integral, relative (`Completeness.path`)
    settings: of the calibration, and `resamples`
    notes: what a reader should know
    """

    model: str
    data: str
    layers: tuple[Layer, ...]
    pearson: Agreement
    spearman: Agreement
    contribution_range: float
    gradient_range: float
    stability: tuple[Stability, ...]
    path_residual: float
    settings: dict
    notes: tuple[str, ...] = ()

    def zone(self, name: str) -> list[Layer]:
        """Layers of a zone, the largest disagreement first."""
        found = [layer for layer in self.layers if layer.zone == name]
        return sorted(found, key=lambda layer: -abs(layer.gradient - layer.contribution))

    def to_dict(self) -> dict:
        """For JSON: what is not defined or infinite is None."""
        return _finite(dataclasses.asdict(self))

    def save(self, path: Path | str) -> None:
        """Writes one JSON file, whole or not at all."""
        storage.write_json(path, {"kind": KIND, "version": 1, **self.to_dict()})

    def table(self) -> str:
        """Everything but the layers that agree."""
        s = self.settings
        lines = [
            f"{self.model}, {len(self.layers)} {s['granularity']}s",
            f"{self.data}; {s['examples']} examples, {s['steps']} {s['quadrature']} points from the {s['baseline']} baseline, "
            f"estimator {s['estimator']}; the path integral misses {self.path_residual:.1%}",
            "",
            f"{'gradient with contribution':<38}{'':>8}{'over examples':>18}{'over layers':>18}",
        ]
        for name, found in (("Pearson", self.pearson), ("Spearman", self.spearman)):
            over = f"{_interval(found.over_examples):>18}{_interval(found.over_layers):>18}"
            lines.append(f"{name:<38}{_decimals(found.value):>8}{over}")
        for name, spread in (("contribution", self.contribution_range), ("gradient", self.gradient_range)):
            most = max(self.layers, key=lambda layer: getattr(layer, name))
            lines.append(f"{'range of ' + name + ', largest / least':<38}{_spread(spread):>8}   most: {most.name}")
        lines += self._zone_lines("red", "red zone: gradient ≥ 2 × contribution")
        lines += self._zone_lines("under", "under-served: contribution ≥ 2 × gradient")
        if self.stability:
            lines += ["", f"{'order of layers, Spearman mean (least)':<48}{'contribution':>14}{'gradient':>14}{'prior':>14}"]
        for row in self.stability:
            cells = "".join(f"{_mean_least(pair, row.pairs):>14}" for pair in (row.contribution, row.gradient, row.prior))
            lines.append(f"{_words(row, s):<48}{cells}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _zone_lines(self, zone: str, title: str) -> list[str]:
        found = self.zone(zone)
        lines = ["", f"{title}: {len(found)} of {len(self.layers)}"]
        for layer in found[:_MOST_NAMED]:
            sure = "" if math.isnan(layer.certainty) else f", in {layer.certainty:.0%} of resamples"
            lines.append(f"  {layer.name}: gradient {layer.gradient:.1%}, contribution {layer.contribution:.1%}{sure}")
        return lines + ([f"  and {len(found) - _MOST_NAMED} more"] if len(found) > _MOST_NAMED else [])


def diagnose(
    scores: LayerScores,
    draws: Sequence[LayerScores] = (),
    paths: Sequence[LayerScores] = (),
    *,
    model: str,
    data: str,
    notes: Sequence[str] = (),
    resamples: int = 2000,
    seed: int = 0,
) -> Diagnosis:
    """Agreement of gradient and contribution in `scores`, and how far it depends on examples and path points.

    draws: calibrations of the same model and settings on other examples, disjoint from these and from one another
    paths: calibrations on the same examples with other numbers of path points
    model, data: in words, for the table and the file
    resamples, seed: of the bootstrap

    Without `gradient_norms` (files of earlier releases) what resamples examples is unknown, and a note says so.

    Raises ValueError for calibrations that do not belong together or are not finite.
    """
    _check(scores, draws, paths)
    found = measures.factors(scores)
    own = found.contribution, found.gradient
    rng = np.random.default_rng(seed)
    examples, layers = resampled_examples(scores, resamples, rng), resampled_layers(own, resamples, rng)
    agreement = {
        name: Agreement(
            value := correlation(*own).value,
            interval_over_examples(correlation, examples, value),
            interval_over_layers(correlation, layers),
        )
        for name, correlation in (("pearson", measures.pearson), ("spearman", measures.spearman))
    }
    notes = list(notes)
    if scores.gradient_norms is None:
        notes.append("these scores keep no gradient norms of single examples; calibrate again for intervals over examples")
    elif examples is None:
        notes.append("no intervals over examples: there is one")
    if layers is None:
        notes.append(f"no intervals over layers: they need {FEWEST_LAYERS} layers, there are {len(scores.sites)}")
    return Diagnosis(
        model=model,
        data=data,
        layers=_layers(scores.sites, found, examples),
        pearson=agreement["pearson"],
        spearman=agreement["spearman"],
        contribution_range=_range(found.contribution),
        gradient_range=_range(found.gradient),
        stability=tuple(_stability(scores, draws, paths, rng)),
        path_residual=scores.completeness.path,
        settings={**scores.settings, "resamples": resamples},
        notes=tuple(notes),
    )


def by_block(scores: LayerScores) -> LayerScores:
    """Scores of single layers summed to transformer blocks, as calibrating with granularity="block" gives them."""
    groups: dict[str, list[int]] = {}
    for i, block in enumerate(blocks_of(scores.sites, [*scores.sites, *scores.unused]).values()):
        groups.setdefault(block, []).append(i)
    members = list(groups.values())
    summed = torch.stack([scores.attributions[:, g].sum(1) for g in members], 1)
    norms = scores.gradient_norms
    return dataclasses.replace(
        scores,
        sites=tuple(groups),
        members=tuple(tuple(name for i in g for name in scores.members[i]) for g in members),
        shapes=tuple(tuple(shape for i in g for shape in scores.shapes[i]) for g in members),
        conductance=summed.abs().mean(0),
        gradient=torch.stack([scores.gradient[g].norm() for g in members]),
        attributions=summed,
        settings={**scores.settings, "granularity": "block"},
        gradient_norms=None if norms is None else torch.stack([norms[:, g].norm(dim=1) for g in members], 1),
    )


def _check(scores: LayerScores, draws: Sequence[LayerScores], paths: Sequence[LayerScores]) -> None:
    if not (torch.isfinite(scores.conductance).all() and torch.isfinite(scores.gradient).all()):
        raise ValueError("the scores are not finite; calibrate again in fp32")
    for other, free in [(s, {"examples"}) for s in draws] + [(s, {"steps"}) for s in paths]:
        if other.sites != scores.sites or other.fingerprint != scores.fingerprint:
            raise ValueError("a repeated calibration is of another model or of other layers")
        for key in scores.settings.keys() - free:
            if other.settings.get(key) != scores.settings[key]:
                raise ValueError(f"a repeated calibration has {key}={other.settings.get(key)!r}, not {scores.settings[key]!r}")


def _layers(names: Sequence[str], found: measures.Factors, examples: Factors | None) -> tuple[Layer, ...]:
    G = len(names)
    zones = dict.fromkeys(found.red, "red") | dict.fromkeys(found.under, "under")
    intervals, certainty = [(UNKNOWN, UNKNOWN)] * G, [math.nan] * G
    if examples is not None:
        x, y = map(even_shares, examples)
        intervals = [(bounds(x[:, i] / G), bounds(y[:, i] / G)) for i in range(G)]
        hits = {"red": _above(y, x), "under": _above(x, y)}
        hits[""] = ~(hits["red"] | hits["under"])
        certainty = [float(hits[zones.get(i, "")][:, i].mean()) for i in range(G)]
    shares = zip(found.contribution / G, found.gradient / G, strict=True)
    return tuple(
        Layer(names[i], float(x), intervals[i][0], float(y), intervals[i][1], zones.get(i, ""), certainty[i])
        for i, (x, y) in enumerate(shares)
    )


def _above(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one >= 1) & (one >= measures.ZONE_RATIO * other)


def _range(values: np.ndarray) -> float:
    least = values.min()
    return float(values.max() / least) if least > 0 else math.inf


def _stability(
    scores: LayerScores, draws: Sequence[LayerScores], paths: Sequence[LayerScores], rng: np.random.Generator
) -> list[Stability]:
    n, rows = len(scores.attributions), []
    for size in (n // 4, n // 2):
        if size >= 2 and scores.gradient_norms is not None:
            rows.append(_between("size", size, [disjoint_parts(scores, size, rng) for _ in range(SUBSET_PAIRS)]))
    if draws:
        rows.append(_between("seeds", n, list(combinations(map(factors_of, (scores, *draws)), 2))))
    for other in sorted(paths, key=lambda s: s.settings["steps"]):
        rows.append(_between("points", other.settings["steps"], [(factors_of(scores), factors_of(other))]))
    return rows


def _between(what: str, setting: int, pairs: Sequence[tuple[Factors, Factors]]) -> Stability:
    columns = []
    for factor in (lambda x, y: x, lambda x, y: y, lambda x, y: x * y):
        values = [measures.spearman(factor(*one), factor(*other)).value for one, other in pairs]
        columns.append((float(np.mean(values)), float(np.min(values))))
    return Stability(what, setting, len(pairs), *columns)


def _words(row: Stability, settings: dict) -> str:
    if row.what == "points":
        return f"{row.setting} and {settings['steps']} path points, these examples"
    which = "disjoint parts of these" if row.what == "size" else "other draws"
    return f"{row.setting} examples, {which} ({row.pairs} {'pairs' if row.pairs > 1 else 'pair'})"


def _decimals(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _spread(ratio: float) -> str:
    return "∞" if math.isinf(ratio) else f"{ratio:,.1f}" if ratio < 1000 else f"{ratio:,.0f}"


def _interval(bounds: Bounds) -> str:
    return "–" if math.isnan(bounds[0]) else f"[{bounds[0]:.2f}, {bounds[1]:.2f}]"


def _mean_least(pair: Bounds, pairs: int) -> str:
    least = f" ({pair[1]:.2f})" if pairs > 1 else ""
    return "–" if math.isnan(pair[0]) else f"{pair[0]:.3f}{least}"


def _finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
