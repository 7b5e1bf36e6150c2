"""The gates, after training and on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cobra.plan import RankPlan
from cobra.report import measures
from cobra.report.names import letters, short_names
from cobra.report.plots.canvas import (
    BLUE,
    MOST_LABELS,
    MOST_LINES,
    MOST_POINTS,
    MUTED,
    VERMILION,
    colour_bar,
    finish,
    mark_cut,
    name_ticks,
    new_figure,
    styled,
    thinned,
)


@styled
def gate_probabilities(plan: RankPlan, path: Path | str | None = None) -> Figure:
    """Posterior of every gate, group by group, kept and dropped; of many groups the span and median of each kind."""
    names = short_names(site.name for site in plan.sites)
    G = len(names)
    width = min(9.6, max(5.8, 1 + 0.17 * G))
    figure, axes = new_figure(width, 3.0 + 0.075 * max(map(letters, names)))
    low, high = measures.UNDECIDED
    axes.axhspan(low, high, color=MUTED, alpha=0.16, linewidth=0, label=f"undecided, {low} to {high}")
    for kept, colour, label in ((True, BLUE, "kept"), (False, VERMILION, "dropped")):
        gates = [[(k, p) for k, p in enumerate(site.posterior) if (k in site.kept) == kept] for site in plan.sites]
        label = f"{label} ({sum(map(len, gates)):,})"
        if G > MOST_LABELS:
            _spans(axes, {g - 0.2 + 0.4 * kept: [p for _, p in one] for g, one in enumerate(gates) if one}, colour, label)
            continue
        across = [g - 0.35 + 0.7 * k / max(1, len(plan.sites[g].posterior) - 1) for g, one in enumerate(gates) for k, _ in one]
        marker = {"marker": "o", "linewidth": 0} if kept else {"marker": "x", "linewidth": 0.8}
        axes.scatter(across, [p for one in gates for _, p in one], s=9, color=colour, label=label, **marker)
    name_ticks(axes.xaxis, names, 0, most=int((width - 0.8) / 0.15))
    axes.tick_params(axis="x", rotation=90)
    axes.set(ylabel="gate probability", ylim=(-0.03, 1.03), xlim=(-0.7, G - 0.3))
    figure.legend(loc="outside lower left", ncols=3)
    return finish(figure, path)


def _spans(axes: Axes, values: dict[float, list[float]], colour: str, label: str) -> None:
    """values: place -> probabilities"""
    spans = np.array([(min(p), np.median(p), max(p)) for p in values.values()]).reshape(-1, 3)
    axes.vlines([*values], spans[:, 0], spans[:, 2], color=colour, linewidth=0.8)
    axes.scatter([*values], spans[:, 1], s=6, color=colour, linewidth=0, label=f"{label}: span, median")


@styled
def gate_trajectories(
    gates: dict[int, dict[str, list[float]]],
    plan: RankPlan | None = None,
    cut: int | None = None,
    path: Path | str | None = None,
) -> Figure:
    """Gate probabilities over steps, kept and dropped apart where a plan says which; below, expected rank group by group."""
    steps, names = np.array(list(gates)), list(next(iter(gates.values())))
    kept = {(s.name, k) for s in plan.sites for k in s.kept} if plan is not None else set()
    p = np.array([[q for name in names for q in row[name]] for row in gates.values()])
    mask = np.array([(name, k) in kept for name in names for k in range(len(next(iter(gates.values()))[name]))])
    size = min(14.0, 0.6 + max(1.2, (0.15 if len(names) <= MOST_LABELS else 0.02) * len(names)))
    figure, (above, below) = new_figure(6.4, 2.8 + size, 2, height_ratios=(2.0, size), sharex=True)
    thin = thinned(len(steps), MOST_POINTS)
    for kept_here, colour, label in ((True, BLUE, "kept"), (False, VERMILION, "dropped")):
        chosen = np.flatnonzero(mask == kept_here)
        if not len(chosen):
            continue
        low, middle, high = np.quantile(p[:, chosen], (0.1, 0.5, 0.9), axis=1)
        lines = chosen[np.unique(np.linspace(0, len(chosen) - 1, MOST_LINES // 2).astype(int))]
        above.plot(steps[thin], p[thin][:, lines], color=colour, alpha=0.25, linewidth=0.5)
        above.fill_between(steps[thin], low[thin], high[thin], color=colour, alpha=0.18, linewidth=0)
        text = f"{label} ({len(chosen):,})" if plan is not None else "all gates"
        above.plot(steps[thin], middle[thin], color=colour, linewidth=2, label=f"{text}: median, 10–90 %")
    above.set(ylabel="gate probability", ylim=(-0.03, 1.03))
    columns = thinned(len(steps), 200)
    expected = np.array([[sum(row[name]) for name in names] for row in gates.values()])[columns].T
    shown = steps[columns]
    # the image needs equal columns; steps are logged at equal distances, but for the last
    image = below.imshow(
        expected,
        aspect="auto",
        cmap="viridis",
        interpolation="nearest",
        extent=(shown[0], max(shown[-1], shown[0] + 1), len(names) - 0.5, -0.5),
    )
    name_ticks(below.yaxis, short_names(names), 0, most=int(size / 0.14))
    below.set(xlabel="step", ylabel="group")
    colour_bar(figure, image, below, "expected rank", size)
    mark_cut((above, below), cut)
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return finish(figure, path)
