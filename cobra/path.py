"""Points on the path from the baseline to the input, and the matrix that turns what is seen there into an attribution.

An estimator is a matrix Q over the points α_1 … α_n (see `cobra_kernels.conductance_reduce`):

    paper         Q = w (e_n - e_1)ᵀ      end difference times path-averaged gradient            COBRA Eq. (1)
    conductance   Q = D                   D h approximates the change of h around each point     Dhamdhere et al. 2018
    direct        Q = D                   the same, with gradients that pass no other site (`cobra.conductance`)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ESTIMATORS = ("paper", "conductance", "direct")
QUADRATURES = ("midpoint", "gausslegendre", "trapezoid", "lobatto")


@dataclass(frozen=True)
class PathRule:
    """alphas: (n,) fp64, ascending in [0, 1].  q: (n, n) fp64, or (n, 2) over the outputs at both ends of the path."""

    alphas: Tensor
    q: Tensor

    def chunks(self, size: int) -> list[PathRule]:
        """Smaller rules whose attributions add up to this one's; each evaluates at most about `size` points."""
        if len(self.alphas) <= size:
            return [self]
        rows = self.q.abs().sum(1).nonzero().flatten().tolist()
        support = [self._support(rows[:stop]) for stop in (1, len(rows))]
        if len(support[0]) == len(support[1]):
            return [self]  # every row needs every point: nothing to split
        parts, start = [], 0
        while start < len(rows):
            stop = start + 1
            while stop < len(rows) and len(self._support(rows[start : stop + 1])) <= size:
                stop += 1
            parts.append(self._restricted(rows[start:stop]))
            start = stop
        return parts

    def between_ends(self) -> PathRule | None:
        """The rule at the points whose gradients count, where outputs count at both ends alone and gradients do not there."""
        rows, columns = (self.q.abs().sum(axis).nonzero().flatten() for axis in (1, 0))
        ends = [0, len(self.alphas) - 1]
        if columns.tolist() != ends or self.alphas[ends].tolist() != [0, 1] or set(rows.tolist()) & set(ends):
            return None
        return PathRule(self.alphas[rows], self.q[rows][:, columns])

    def _support(self, rows: list[int]) -> list[int]:
        columns = self.q[rows].abs().sum(0).nonzero().flatten().tolist()
        return sorted({*rows, *columns})

    def _restricted(self, rows: list[int]) -> PathRule:
        points = self._support(rows)
        kept = torch.zeros(len(self.alphas), dtype=torch.bool, device="cpu")
        kept[rows] = True
        return PathRule(self.alphas[points], (self.q * kept[:, None])[points][:, points])


def path_rule(estimator: str, quadrature: str, steps: int) -> PathRule:
    """The rule of an estimator with `steps` gradient evaluations.

    "midpoint" and "gausslegendre" are captum's nodes (its riemann_middle and gausslegendre): conductance on them equals
    captum's LayerConductance with n_steps = steps. "trapezoid" averages the gradients at both ends of each interval.
    "lobatto" differentiates the interpolating polynomial at Gauss-Lobatto nodes: for smooth models 5 to 17 steps suffice.

    Raises ValueError for unknown names and too few steps.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r} is not one of {', '.join(ESTIMATORS)}")
    if quadrature not in QUADRATURES:
        raise ValueError(f"quadrature={quadrature!r} is not one of {', '.join(QUADRATURES)}")
    least = 2 if quadrature in ("trapezoid", "lobatto") else 1
    if not isinstance(steps, int) or steps < least:
        raise ValueError(f"steps={steps!r}: {quadrature} needs an integer of at least {least}")
    alphas, q = _paper(quadrature, steps) if estimator == "paper" else _differences(quadrature, steps)
    return PathRule(torch.from_numpy(alphas), torch.from_numpy(q))


def _nodes(quadrature: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of a rule on [0, 1]."""
    if quadrature == "midpoint":
        return (np.arange(n) + 0.5) / n, np.full(n, 1 / n)
    if quadrature == "gausslegendre":
        x, w = np.polynomial.legendre.leggauss(n)
        return (x + 1) / 2, w / 2
    if quadrature == "trapezoid":
        w = np.full(n, 1 / (n - 1))
        w[[0, -1]] /= 2
        return np.linspace(0, 1, n), w
    legendre = np.polynomial.legendre.Legendre.basis(n - 1)
    x = np.concatenate(([-1.0], np.sort(legendre.deriv().roots().real), [1.0]))
    return (x + 1) / 2, 1 / (n * (n - 1) * legendre(x) ** 2)


def _paper(quadrature: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    alphas, weights = _with_ends(*_nodes(quadrature, steps))
    q = np.zeros((len(alphas),) * 2)
    q[:, -1], q[:, 0] = weights, -weights
    return alphas, q


def _differences(quadrature: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    if quadrature == "lobatto":
        alphas, weights = _nodes(quadrature, steps)
        return alphas, weights[:, None] * _differentiation(alphas)
    if quadrature == "trapezoid":
        alphas, _ = _nodes(quadrature, steps)
        rows = np.arange(steps - 1)
        q = np.zeros((steps, steps))
        for i in (rows, rows + 1):
            np.add.at(q, (i, rows + 1), 0.5)
            np.add.at(q, (i, rows), -0.5)
        return alphas, q
    rows = np.arange(steps)
    q = np.zeros((steps + 1,) * 2)
    q[rows, rows + 1], q[rows, rows] = 1, -1
    return _nodes(quadrature, steps + 1)[0], q


def _with_ends(alphas: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nodes with 0 and 1 among them, weighing nothing where they are added."""
    if alphas[0] > 0:
        alphas, weights = np.concatenate(([0.0], alphas)), np.concatenate(([0.0], weights))
    if alphas[-1] < 1:
        alphas, weights = np.concatenate((alphas, [1.0])), np.concatenate((weights, [0.0]))
    return alphas, weights


def _differentiation(x: np.ndarray) -> np.ndarray:
    """D with (D f)_i the derivative at x_i of the polynomial through f (barycentric form)."""
    gaps = x[:, None] - x[None, :] + np.eye(len(x))
    c = (4 * gaps).prod(1)  # only ratios count; 4 keeps the products of many gaps in range
    d = c[:, None] / (c[None, :] * gaps)
    np.fill_diagonal(d, 0)
    np.fill_diagonal(d, -d.sum(1))
    return d
