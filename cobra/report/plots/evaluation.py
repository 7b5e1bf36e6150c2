"""Whether the model is as often right as it is sure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cobra.report import measures
from cobra.report.plots.canvas import BLUE, MUTED, finish, new_figure, styled
from cobra.report.run import Bin


@styled
def reliability(bins: Sequence[Bin], path: Path | str | None = None) -> Figure:
    """Accuracy against confidence with 95 % intervals, and how many examples stand behind each point."""
    figure, (above, below) = new_figure(4.2, 5.0, 2, height_ratios=(4, 1), sharex=True)
    shown = sorted((b for b in bins if b.count), key=lambda b: b.confidence)
    x, y = np.array([b.confidence for b in shown]), np.array([b.accuracy for b in shown])
    bounds = np.array([measures.wilson(b.accuracy, b.count) for b in shown]).T
    low = np.floor(10 * min(x.min(), bounds[0].min())) / 10
    above.plot([low, 1], [low, 1], color=MUTED, linewidth=0.8, linestyle=":")
    above.errorbar(x, y, np.abs(bounds - y), color=BLUE, marker="o", markersize=4, linewidth=1.4, elinewidth=0.9)
    above.set(ylabel="accuracy", ylim=(low - 0.02, 1.02))
    above.set_title(f"Expected calibration error {measures.calibration_error(bins):.3f}")
    width = np.clip(0.8 * np.diff(x, append=x[-1] + 1).min(), 0.004, 0.04)
    below.bar(x, [b.count for b in shown], width=width, color=BLUE)
    below.set(xlabel="confidence", ylabel="examples", xlim=(low - 0.02, 1.02))
    return finish(figure, path)
