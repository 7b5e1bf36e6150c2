"""What a merge did to the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cobra.merge import MergeReport
from cobra.report.names import short_names
from cobra.report.plots.canvas import BLUE, LINE, MOST_LABELS, VERMILION, finish, name_ticks, new_figure, styled


@styled
def merge_updates(report: MergeReport, path: Path | str | None = None) -> Figure:
    """Layer by layer: the update beside its weight, and the share of it that rounding lost; hollow where a layer stays
    unmerged."""
    names = short_names([site.name for site in report.sites])
    figure, panels = new_figure(7.0, min(12.0, 1.2 + 0.16 * len(names)), columns=2, sharey=True)
    merged = np.array([site.merged for site in report.sites], dtype=bool)
    sizes = np.array([site.delta_norm / max(site.weight_norm, 1e-30) for site in report.sites])
    lost = np.array([site.rounding_loss for site in report.sites])
    _dots(panels[0], sizes, merged, BLUE, "‖ΔW‖ / ‖W‖")
    _dots(panels[1], lost, merged, VERMILION, "share of ΔW lost to rounding")
    name_ticks(panels[0].yaxis, names, 0.0, MOST_LABELS)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    panels[0].set_title(f"{merged.sum():,} of {len(names):,} layers merged")
    return finish(figure, path)


def _dots(axes: Axes, values: np.ndarray, merged: np.ndarray, colour: str, label: str) -> None:
    rows = np.arange(len(values))
    axes.hlines(rows, 0, values, color=LINE, linewidth=1)
    axes.scatter(values[merged], rows[merged], s=16, color=colour, zorder=3)
    axes.scatter(values[~merged], rows[~merged], s=16, facecolor="none", edgecolor=colour, zorder=3)
    axes.set_xlim(0, max(float(values.max(initial=0.0)) * 1.08, 1e-30))
    axes.set_xlabel(label)
