"""What training and the cut made of the prior."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from cobra.plan import RankPlan
from cobra.prior import fuse
from cobra.report import measures
from cobra.report.names import grid, letters, short_names
from cobra.report.plots.canvas import (
    BLUE,
    LINE,
    MOST_LABELS,
    MUTED,
    SURFACE,
    VERMILION,
    colour_bar,
    finish,
    name_ticks,
    new_figure,
    styled,
)
from cobra.scores import LayerScores

TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1)


@styled
def prior_posterior(scores: LayerScores, plan: RankPlan, path: Path | str | None = None, fusion: str = "product") -> Figure:
    """Share of every group before training (prior π), after it (expected rank) and after the cut: points on lines, or maps."""
    shares = {"prior π": fuse(scores.conductance, scores.gradient, fusion).numpy()}
    if measures.was_trained(plan):
        shares["expected rank"] = _share([sum(site.posterior) for site in plan.sites])
    shares["kept"] = _share([site.rank for site in plan.sites])
    draw = _lines if len(scores.sites) <= MOST_LABELS else _maps
    return finish(draw(scores.sites, shares), path)


def _lines(names: tuple[str, ...], shares: dict[str, np.ndarray]) -> Figure:
    G, y = len(names), np.arange(len(names))
    figure, axes = new_figure(5.8, 1.3 + 0.19 * G)
    axes.hlines(y, *np.quantile([*shares.values()], (0, 1), axis=0), color=LINE, linewidth=2, zorder=1)
    marks = {
        "prior π": {"facecolor": SURFACE, "edgecolor": MUTED, "linewidth": 1.2, "s": 26},
        "expected rank": {"color": BLUE, "linewidth": 0, "s": 26},
        "kept": {"color": VERMILION, "marker": "|", "linewidth": 1.8, "s": 60},
    }
    for order, (label, share) in enumerate(shares.items()):
        axes.scatter(share, y, label=label, zorder=2 + order, clip_on=False, **marks[label])
    axes.axvline(1 / G, color=MUTED, linewidth=0.8, linestyle=":")
    name_ticks(axes.yaxis, short_names(names), 0)
    # shares are squares of distances on the axis: one large group would press all others against zero
    largest = max(share.max() for share in shares.values())
    axes.set_xscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
    axes.set_xlim(0, 1.1 * largest)
    ticks = [0.0]
    for tick in TICKS:
        if tick <= largest and np.sqrt(tick) - np.sqrt(ticks[-1]) > 0.12 * np.sqrt(largest):
            ticks.append(tick)
    axes.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    axes.set(ylim=(G - 0.5, -0.5), xlabel="share of all ranks, square-root scale (dotted: an even share)")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def _maps(names: tuple[str, ...], shares: dict[str, np.ndarray]) -> Figure:
    """A map each, of the same layout as that of the ranks."""
    found = [grid(dict(zip(names, share, strict=True))) for share in shares.values()]
    rows, columns = found[0].values.shape
    width, height = np.clip(0.3 * columns, 1.2, 3.0), np.clip(0.15 * rows, 2.0, 12.0)
    below = 0.075 * max(map(letters, found[0].columns or [""]))
    figure, panels = new_figure(1.6 + len(found) * (width + 0.1), 0.7 + height + below, 1, len(found), sharey=True)
    norm = PowerNorm(0.5, 0, max(share.max() for share in shares.values()) or 1)
    for axes, label, one in zip(panels, shares, found, strict=True):
        image = axes.pcolormesh(one.values, cmap="viridis", norm=norm, edgecolor=SURFACE, linewidth=0.4)
        axes.set_title(label)
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_xticks([])
        if one.columns is not None:
            name_ticks(axes.xaxis, one.columns, 0.5, most=int(width / 0.15))
            axes.tick_params(axis="x", rotation=90)
        axes.set_xlabel(one.column_label)
    name_ticks(panels[0].yaxis, found[0].rows, 0.5, most=int(height / 0.15))
    panels[0].invert_yaxis()
    panels[0].set_ylabel(found[0].row_label)
    colour_bar(figure, image, panels, "share of all ranks", height, format=lambda share, _: f"{100 * share:g} %")
    return figure


def _share(values: list[float]) -> np.ndarray:
    total = sum(values)
    return np.array(values, float) / total if total else np.zeros(len(values))
