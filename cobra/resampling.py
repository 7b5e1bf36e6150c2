"""Contribution and gradient of other calibration sets, made from the examples of one: bootstraps and disjoint parts.

A pair of factors is (contribution, gradient), each (G,) or, one row a calibration set, (B, G).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from cobra.report.measures import Correlation
from cobra.scores import LayerScores

FEWEST_LAYERS = 4

Bounds = tuple[float, float]
Factors = tuple[np.ndarray, np.ndarray]
UNKNOWN: Bounds = (math.nan, math.nan)


def factors_of(scores: LayerScores) -> Factors:
    return scores.conductance.double().numpy(), scores.gradient.double().numpy()


def weighted_factors(scores: LayerScores, weights: np.ndarray) -> Factors:
    """Both factors of calibration sets in which each example has a weight; needs `gradient_norms`.

    weights: (B, n), rows sum to 1
    """
    attributed, norms = scores.attributions.double().numpy(), scores.gradient_norms.double().numpy()
    return weights @ np.abs(attributed), np.sqrt(weights @ np.square(norms))


def resampled_examples(scores: LayerScores, resamples: int, rng: np.random.Generator) -> Factors | None:
    """Of as many examples, drawn with replacement, the same ones for both factors; None of one, or without `gradient_norms`."""
    n = len(scores.attributions)
    if scores.gradient_norms is None or n < 2:
        return None
    return weighted_factors(scores, rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n)


def resampled_layers(factors: Factors, resamples: int, rng: np.random.Generator) -> Factors | None:
    """Of as many layers, drawn with replacement; None where there are fewer than 4."""
    G = len(factors[0])
    if G < FEWEST_LAYERS:
        return None
    drawn = rng.integers(G, size=(resamples, G))
    return factors[0][drawn], factors[1][drawn]


def disjoint_parts(scores: LayerScores, size: int, rng: np.random.Generator) -> tuple[Factors, Factors]:
    """Both factors of two calibration sets of `size` examples that share none."""
    order = rng.permutation(len(scores.attributions))
    weights = np.zeros((2, len(order)))
    weights[0, order[:size]] = weights[1, order[size : 2 * size]] = 1 / size
    contribution, gradient = weighted_factors(scores, weights)
    return (contribution[0], gradient[0]), (contribution[1], gradient[1])


def interval_over_layers(correlation: Callable[..., Correlation], resampled: Factors | None) -> Bounds:
    """95 % percentile interval."""
    return UNKNOWN if resampled is None else bounds(_correlations(correlation, resampled))


def interval_over_examples(correlation: Callable[..., Correlation], resampled: Factors | None, value: float) -> Bounds:
    """95 % interval by reflecting the percentiles at the value, (2 v - high, 2 v - low), within [-1, 1].

    Noise of few examples takes a correlation over layers towards 0, and a resample's noise does so once more, by as much.
    Reflected, that cancels: with 32 simulated examples intervals held the truth in 85 to 94 % (percentiles: 20 to 93 %).
    """
    if resampled is None:
        return UNKNOWN
    low, high = bounds(_correlations(correlation, resampled))
    return tuple(min(1.0, max(-1.0, 2 * value - end)) for end in (high, low)) if math.isfinite(value + low) else UNKNOWN


def _correlations(correlation: Callable[..., Correlation], resampled: Factors) -> np.ndarray:
    return np.array([correlation(x, y).value for x, y in zip(*resampled, strict=True)])


def bounds(values: np.ndarray) -> Bounds:
    """2.5th and 97.5th percentile; resamples in which the value is not defined do not count."""
    values = values[np.isfinite(values)]
    if not len(values):
        return UNKNOWN
    low, high = np.quantile(values, (0.025, 0.975)).tolist()
    return low, high


def even_shares(values: np.ndarray) -> np.ndarray:
    """(B, G) rows as multiples of an even share."""
    totals = values.sum(1, keepdims=True)
    return np.divide(values * values.shape[1], totals, out=np.zeros_like(values), where=totals > 0)
