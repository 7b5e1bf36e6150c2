"""Gradient demand beside contribution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from cobra.report import measures
from cobra.report.names import plain, short_names
from cobra.report.plots.canvas import (
    BLUE,
    MUTED,
    SMALLEST_TYPE,
    SURFACE,
    VERMILION,
    colour_bar,
    finish,
    new_figure,
    styled,
)
from cobra.scores import LayerScores

MOST_NAMED = 6


@styled
def factor_scatter(scores: LayerScores, path: Path | str | None = None) -> Figure:
    """Gradient demand against contribution, a point a group, as multiples of an even share; the red zone and its opposite."""
    figure, axes = new_figure(5.8, 5.0)
    f = measures.factors(scores)
    x, y = f.contribution, f.gradient
    points = axes.scatter(
        x, y, c=np.arange(len(x)), cmap="viridis", s=30 if len(x) <= 150 else 14, edgecolor=MUTED, linewidth=0.6, zorder=3
    )
    low, high = _square(axes, x, y)
    axes.plot([low, high], [low, high], color=MUTED, linewidth=0.8, linestyle=":")
    edge, ratio = np.geomspace(1, max(high, 2), 50), measures.ZONE_RATIO
    red, under = ({"color": colour, "alpha": 0.16, "linewidth": 0} for colour in (VERMILION, BLUE))
    axes.fill_between(edge / ratio, np.maximum(edge, 1), high, **red)
    axes.fill_between([low, 1 / ratio], 1, high, label=f"red zone: gradient ≥ {ratio:g} × contribution", **red)
    axes.fill_between(edge, low, edge / ratio, label=f"contribution ≥ {ratio:g} × gradient", **under)
    names = short_names(scores.sites)
    for zone, colour in ((f.red, VERMILION), (f.under, BLUE)):
        _label_points(axes, [(names[i], x[i], y[i]) for i in zone[:MOST_NAMED]], colour)
    if len(x) > 1:
        colour_bar(figure, points, axes, "group, in the model's order", 4.2)
    axes.set_xlabel(f"contribution φ, even share = 1 ({plain(scores.settings['estimator'])})")
    axes.set_ylabel("gradient demand Γ, even share = 1")
    axes.set_title(f"Pearson {measures.pearson(x, y)}\nSpearman {measures.spearman(x, y)}, {len(x)} groups")
    figure.legend(loc="outside lower left", ncols=2)
    return finish(figure, path)


def _square(axes: Axes, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The same limits for both axes, and logarithms where nothing is zero."""
    if (x > 0).all() and (y > 0).all():
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        low, high = min(x.min(), y.min()) / 1.4, max(x.max(), y.max(), 1.5) * 1.4
    else:
        low, high = 0, max(x.max(), y.max(), 1.5) * 1.1
    axes.set(xlim=(low, high), ylim=(low, high))
    return low, high


def _label_points(axes: Axes, points: list[tuple[str, float, float]], colour: str) -> None:
    """Names beside points, to the left of those at the right edge, moved down until they do not touch one that is there."""
    placed: list[tuple[float, float]] = []
    for name, x, y in sorted(points, key=lambda point: -point[2]):
        across, up = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
        down = 0.0
        while any(abs(across - a) < 0.35 and abs(up - down - u) < 0.036 for a, u in placed):
            down += 0.009
        placed.append((across, up - down))
        left = across > 0.6
        ground = {"facecolor": SURFACE, "alpha": 0.8, "linewidth": 0, "pad": 0.8}
        where = {"xytext": (across + (-0.018 if left else 0.018), up - down), "textcoords": "axes fraction", "va": "center"}
        axes.annotate(
            name, (x, y), **where, ha="right" if left else "left", fontsize=SMALLEST_TYPE, color=colour, bbox=ground, zorder=5
        )
