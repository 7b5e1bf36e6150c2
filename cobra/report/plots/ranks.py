"""Where the ranks went."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cobra.plan import RankPlan
from cobra.report.names import grid, letters
from cobra.report.plots.canvas import (
    SMALLEST_TYPE,
    SURFACE,
    colour_bar,
    finish,
    ink_on,
    name_ticks,
    new_figure,
    styled,
)


@styled
def rank_heatmap(plan: RankPlan, path: Path | str | None = None) -> Figure:
    """Rank of every layer: blocks down, modules across; bold where every gate is kept, blank where there is no such layer."""
    ranks = plan.ranks
    found = grid(ranks)
    rows, columns = found.values.shape
    width = 0.5 if columns <= 12 else min(max(0.16, 9 / columns), 15 / columns)
    height = 0.28 if rows <= 40 else min(max(0.1, 12 / rows), 15 / rows)
    numbered = width >= 0.25 and height >= 0.16
    beside, below = 0.09 * max(map(letters, found.rows), default=0), 0.075 * max(map(letters, found.columns or [""]))
    across = 0.6 + beside + width * columns + (0 if numbered else 0.9)
    figure, axes = new_figure(max(3.3, across), 0.8 + height * rows + below)
    levels = max(2, max(ranks.values(), default=0) + 1)
    image = axes.pcolormesh(
        found.values,
        cmap=matplotlib.colormaps["viridis"].resampled(min(256, levels)),
        vmin=-0.5,
        vmax=levels - 0.5,
        edgecolor=SURFACE,
        linewidth=1 if min(width, height) > 0.2 else 0.2,
    )
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    name_ticks(axes.yaxis, found.rows, 0.5, most=int(rows * height / 0.16))
    if found.columns is None:
        axes.set_xticks([])
    else:
        axes.set_xticks(np.arange(columns) + 0.5, found.columns, rotation=60, ha="right", rotation_mode="anchor")
    axes.set(xlabel=found.column_label, ylabel=found.row_label)
    if numbered:
        full = grid({name: site.rank == len(site.posterior) for site in plan.sites for name in site.members}).values
        for (i, j), rank in np.ndenumerate(found.values):
            if np.isfinite(rank):
                weight = {"fontweight": "bold" if full[i, j] else "normal", "color": ink_on(image.to_rgba(rank))}
                axes.text(j + 0.5, i + 0.5, f"{rank:.0f}", ha="center", va="center", fontsize=SMALLEST_TYPE, **weight)
    else:
        colour_bar(figure, image, axes, "rank", height * rows, ticks=MaxNLocator(8, integer=True))
    axes.set_title(f"{plan.total:,} ranks, {plan.parameters:,} parameters")
    return finish(figure, path)
