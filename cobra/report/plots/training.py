"""Values that were logged by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cobra.report.names import plain
from cobra.report.plots.canvas import (
    BLUE,
    GREEN,
    LINE,
    MOST_POINTS,
    PURPLE,
    VERMILION,
    finish,
    mark_cut,
    new_figure,
    styled,
    thinned,
)

COLOURS = (BLUE, VERMILION, GREEN, PURPLE)
WINDOW = 20


@styled
def series_panels(
    panels: dict[str, tuple[Sequence[float], Sequence[float]]],
    cut: int | None = None,
    path: Path | str | None = None,
    smooth: bool = True,
) -> Figure:
    """One panel above the other, label -> (steps, values); with `smooth` the mean of 20 logged steps over the raw values."""
    figure, axes = new_figure(5.8, 0.7 + 1.4 * len(panels), len(panels), sharex=True, squeeze=False)
    axes = axes[:, 0]
    for one, (label, (steps, values)), colour in zip(axes, panels.items(), COLOURS * 8, strict=False):
        steps, values = np.asarray(steps), np.asarray(values, float)
        thin = thinned(len(steps), MOST_POINTS)
        at, mean = _smooth(steps, values, cut) if smooth else (steps[:0], values[:0])
        raw = {"alpha": 0.45, "linewidth": 0.8} if len(mean) else {"linewidth": 1.6}
        one.plot(steps[thin], values[thin], color=colour, marker="o" if len(values) == 1 else None, **raw)
        if len(mean):
            shown = thinned(len(mean), MOST_POINTS)
            one.plot(at[shown], mean[shown], color=colour)
        one.set_ylabel(label)
        one.grid(axis="y", color=LINE, linewidth=0.6)
        one.set_axisbelow(True)
        one.yaxis.set_major_locator(MaxNLocator(4))
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    mark_cut(axes, cut)
    figure.align_ylabels(axes)
    return finish(figure, path)


@styled
def loss_curves(curves: dict[str, list[float]], path: Path | str | None = None, cut: int | None = None) -> Figure:
    """Training losses by step, smoothed over 20 steps, with the raw values behind.

    cut: the step at which ranks were cut
    """
    figure, axes = new_figure(6.6, 4.2)
    for (label, values), colour in zip(curves.items(), COLOURS, strict=False):
        axes.plot(values, color=colour, alpha=0.2, linewidth=0.7)
        window = min(WINDOW, len(values))
        axes.plot(np.arange(window - 1, len(values)), _running_mean(np.array(values), window), color=colour, label=plain(label))
    axes.set(xlabel="step", ylabel="training loss")
    mark_cut((axes,), cut)
    axes.legend()
    return finish(figure, path)


def _smooth(steps: np.ndarray, values: np.ndarray, cut: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Steps and running mean; never across the cut, where the objective changes: the line has a gap there."""
    window = min(WINDOW, len(values) // 3)
    if window < 2:
        return steps[:0], values[:0]
    at, mean, middle = [], [], len(steps) if cut is None else int(np.searchsorted(steps, cut))
    for part in (slice(0, middle), slice(middle, None)):
        if len(values[part]) >= window:
            at += [*steps[part][window - 1 :], steps[-1]]
            mean += [*_running_mean(values[part], window), np.nan]
    return np.array(at[:-1]), np.array(mean[:-1])


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    return np.convolve(values, np.full(window, 1 / window), mode="valid")
