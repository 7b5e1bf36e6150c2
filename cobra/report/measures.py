"""Numbers that neither scores nor plan hold: agreement of the two factors, certainty of the cut, calibration error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cobra.plan import RankPlan
from cobra.report.run import Bin, Gates
from cobra.scores import LayerScores

UNDECIDED = (0.1, 0.9)
ZONE_RATIO = 2.0
_Z95 = 1.959964


@dataclass(frozen=True)
class Correlation:
    """A correlation over n groups with its 95 % interval; NaN where it is not defined."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "not defined (one group, or no spread)"
        interval = "" if math.isnan(self.low) else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f}{interval}"


def pearson(x: Iterable[float], y: Iterable[float]) -> Correlation:
    """Linear correlation; interval by Fisher's z, standard error 1/√(n - 3), as if groups were independent."""
    return _correlation(np.asarray(x, float), np.asarray(y, float), lambda r: 1.0)


def spearman(x: Iterable[float], y: Iterable[float]) -> Correlation:
    """Correlation of ranks, ties shared; interval by Fisher's z, standard error √((1 + ρ²/2)/(n - 3)) (Bonett and Wright)."""
    return _correlation(_ranks(np.asarray(x, float)), _ranks(np.asarray(y, float)), lambda r: 1 + r * r / 2)


def _correlation(x: np.ndarray, y: np.ndarray, variance) -> Correlation:
    n = len(x)
    x, y = x - x.mean(), y - y.mean()
    spread = math.sqrt((x @ x) * (y @ y))
    if n < 2 or np.ptp(x) == 0 or np.ptp(y) == 0 or not spread > 0:
        return Correlation(math.nan, math.nan, math.nan, n)
    r = float(np.clip(x @ y / spread, -1, 1))
    if n < 4 or abs(r) == 1:
        return Correlation(r, math.nan, math.nan, n)
    half = _Z95 * math.sqrt(variance(r) / (n - 3))
    return Correlation(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half), n)


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


@dataclass(frozen=True)
class Factors:
    """Both factors as multiples of an even share (1 = what each of G groups would have if all were alike).

    red: indices of the red zone: gradient at least an even share and at least twice the group's contribution
    under: the other way round: contribution at least an even share and at least twice the gradient
    """

    contribution: np.ndarray
    gradient: np.ndarray
    red: list[int]
    under: list[int]


def factors(scores: LayerScores) -> Factors:
    contribution, gradient = (_even(values.double().numpy()) for values in (scores.conductance, scores.gradient))
    return Factors(contribution, gradient, _above(gradient, contribution), _above(contribution, gradient))


def _even(values: np.ndarray) -> np.ndarray:
    total = values.sum()
    return values / total * len(values) if total > 0 else values


def _above(one: np.ndarray, other: np.ndarray) -> list[int]:
    """Largest first."""
    found = np.flatnonzero((one >= 1) & (one >= ZONE_RATIO * other))
    return [int(i) for i in found[np.argsort(-one[found], kind="stable")]]


def undecided(probabilities: Iterable[float]) -> int:
    return sum(UNDECIDED[0] <= p <= UNDECIDED[1] for p in probabilities)


def moved(first: Gates, last: Gates) -> tuple[float, float]:
    """Mean and largest change of a gate's probability between two rows of the same gates."""
    changes = [abs(p - q) for name in first for p, q in zip(first[name], last[name], strict=True)]
    return sum(changes) / len(changes), max(changes)


def was_trained(plan: RankPlan) -> bool:
    """Whether the gates' probabilities are a result: those of a plan from scores alone are not."""
    return bool(plan.sites) and plan.provenance.get("source") != "scores"


def keeps_gates(plan: RankPlan) -> bool:
    """Whether what is kept are gates, rather than singular directions of the updates."""
    return was_trained(plan) and not any(site.energy for site in plan.sites)


def all_gates(plan: RankPlan) -> list[tuple[float, bool]]:
    """(probability, kept) of every gate."""
    kept = [set(site.kept) for site in plan.sites]
    return [(p, k in mine) for site, mine in zip(plan.sites, kept, strict=True) for k, p in enumerate(site.posterior)]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: Σ count |accuracy - confidence| / Σ count."""
    total = sum(b.count for b in bins)
    return sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / total if total else math.nan


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` trials."""
    if not count:
        return math.nan, math.nan
    z2 = _Z95**2 / count
    half = _Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return (share + z2 / 2 - half) / (1 + z2), (share + z2 / 2 + half) / (1 + z2)
