"""What all figures share: colours, type, ticks, and how one becomes a file."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cobra import storage

# blue and vermilion stay apart for every kind of colour vision; all of these can be read as text on the surface, and the page
# exchanges them by theme
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#b84c00", "#00856f", "#a8528c"
INK, MUTED, LINE, SURFACE = "#1c2024", "#626a73", "#d4d8dd", "#ffffff"
# these stand on viridis, which no theme changes
ON_DARK, ON_LIGHT = "#fefefe", "#010101"
SMALLEST_TYPE = 8  # points
STYLE = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.facecolor": SURFACE,
    "font.family": "sans-serif",
    "font.size": 9,
    "legend.fontsize": SMALLEST_TYPE,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "cobra",
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": SMALLEST_TYPE,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": SMALLEST_TYPE,
}
MOST_LINES, MOST_POINTS, MOST_LABELS = 200, 600, 80


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @functools.wraps(draw)
    def within_style(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return within_style


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **settings) -> tuple[Figure, Axes]:
    """Inches. Figure, not pyplot: no global state, no display needed."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    return figure, figure.subplots(rows, columns, **settings)


def finish(figure: Figure, path: Path | str | None) -> Figure:
    if path is not None:
        storage.write_bytes(path, render(figure, Path(path).suffix.lstrip(".").lower() or "png"))
    return figure


def render(figure: Figure, kind: str) -> bytes:
    """The bytes of a PNG or SVG file, the same for the same figure."""
    metadata = {"svg": {"Date": None, "Creator": None}, "png": {"Software": f"matplotlib {matplotlib.__version__}"}}.get(kind)
    data = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script the font lacks prints as boxes
        figure.savefig(data, format=kind, metadata=metadata)
    return data.getvalue()


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """WCAG's ratio of two colours, RGB from 0 to 1: 1 for the same, 21 for black on white; text wants 4.5."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def ink_on(ground: Sequence[float]) -> str:
    """The better of the two inks on a cell of a heat map."""
    return max(ON_DARK, ON_LIGHT, key=lambda ink: contrast(matplotlib.colors.to_rgb(ink), ground))


def _luminance(colour: Sequence[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def colour_bar(figure: Figure, shown, axes, label: str, height: float, **settings):
    """A bar of the same width whatever its height in inches."""
    bar = figure.colorbar(shown, ax=axes, label=label, aspect=max(6, 7 * height), **settings)
    bar.outline.set_visible(False)
    return bar


def name_ticks(axis, names: list[str], offset: float, most: int = MOST_LABELS) -> None:
    """A tick a name, or every n-th where they would touch."""
    every = -(-len(names) // max(1, most))
    axis.set_ticks(np.arange(0, len(names), every) + offset, names[::every])


def mark_cut(panels: Sequence[Axes], cut: int | None) -> None:
    if cut is None:
        return
    for axes in panels:
        axes.axvline(cut, color=MUTED, linestyle="--", linewidth=1)
    where = {"xy": (cut, 1), "xycoords": ("data", "axes fraction"), "xytext": (0, 2), "textcoords": "offset points"}
    panels[0].annotate("ranks cut", ha="center", va="bottom", fontsize=SMALLEST_TYPE, color=MUTED, **where)


def thinned(count: int, most: int) -> np.ndarray:
    """Indices of at most `most` of them, first and last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))
