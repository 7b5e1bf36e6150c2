"""The figures of a run, each a function of what was measured; with a path the figure is written there."""

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
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from cobra import storage
from cobra.plan import RankPlan
from cobra.prior import fuse
from cobra.report import measures
from cobra.report.names import grid, letters, plain, short_names
from cobra.report.run import Bin
from cobra.scores import LayerScores

# blue and vermilion of Okabe and Ito, apart for every kind of colour vision; the page exchanges all of these by theme
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#00856f", "#a8528c"
INK, MUTED, LINE, SURFACE = "#1c2024", "#626a73", "#d4d8dd", "#ffffff"
# these stand on viridis, which no theme changes
ON_DARK, ON_LIGHT = "#fefefe", "#010101"
STYLE = {
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.facecolor": SURFACE,
    "axes.facecolor": SURFACE,
    "font.family": "sans-serif",
    "font.size": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "cobra",
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
MOST_LINES, MOST_POINTS, MOST_LABELS = 200, 600, 80


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @functools.wraps(draw)
    def styled(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def rank_heatmap(plan: RankPlan, path: Path | str | None = None) -> Figure:
    """Rank of every layer: blocks down, modules across; blank where the model has no such layer."""
    ranks = plan.ranks
    found = grid(ranks)
    rows, columns = found.values.shape
    width = 0.75 if columns <= 12 else min(max(0.16, 9 / columns), 15 / columns)
    height = 0.3 if rows <= 40 else min(max(0.1, 12 / rows), 15 / rows)
    beside, labels = 0.09 * max(map(letters, found.rows), default=0), 0.3 + 0.04 * max(map(letters, found.columns or [""]))
    figure, axes = _figure(max(4.2, 2.3 + beside + width * columns), 1.3 + height * rows + labels)
    levels = max(ranks.values(), default=0) + 1
    image = axes.pcolormesh(
        found.values,
        cmap=matplotlib.colormaps["viridis"].resampled(min(256, max(2, levels))),
        vmin=-0.5,
        vmax=max(2, levels) - 0.5,
        edgecolor=SURFACE,
        linewidth=1 if min(width, height) > 0.2 else 0.2,
    )
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    _name_ticks(axes.yaxis, found.rows, 0.5, most=max(1, int(rows * height / 0.16)))
    if found.columns is None:
        axes.set_xticks([])
    else:
        axes.set_xticks(np.arange(columns) + 0.5, found.columns, rotation=35, ha="right", fontsize=8)
    axes.set(xlabel=found.column_label, ylabel=found.row_label)
    if width >= 0.25 and height >= 0.16:
        for (i, j), rank in np.ndenumerate(found.values):
            if np.isfinite(rank):
                colour = ON_DARK if rank < 0.6 * levels else ON_LIGHT
                axes.text(j + 0.5, i + 0.5, f"{rank:.0f}", ha="center", va="center", fontsize=8, color=colour)
    _colour_bar(figure, image, axes, "rank", height * rows, ticks=MaxNLocator(8, integer=True))
    axes.set_title(f"{plan.total:,} ranks, {plan.parameters:,} parameters")
    return _finish(figure, path)


@_styled
def factor_scatter(scores: LayerScores, path: Path | str | None = None) -> Figure:
    """Gradient demand against contribution, a point a group, as multiples of an even share; the red zone and its opposite."""
    figure, axes = _figure(6.4, 5.2)
    f = measures.factors(scores)
    x, y = f.contribution, f.gradient
    points = axes.scatter(
        x, y, c=np.arange(len(x)), cmap="viridis", s=30 if len(x) <= 150 else 14, edgecolor=SURFACE, linewidth=0.5, zorder=3
    )
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
    edge = np.geomspace(1, max(high, 2), 50)
    axes.plot([low, high], [low, high], color=MUTED, linewidth=0.8, linestyle=":")
    zones = ((f.red, VERMILION, "red zone: gradient ≥ 2 × contribution"), (f.under, BLUE, "contribution ≥ 2 × gradient"))
    axes.fill_between(edge / measures.ZONE_RATIO, np.maximum(edge, 1), high, color=VERMILION, alpha=0.16, linewidth=0)
    axes.fill_between([low, 0.5], 1, high, color=VERMILION, alpha=0.16, linewidth=0, label=zones[0][2])
    axes.fill_between(edge, low, edge / measures.ZONE_RATIO, color=BLUE, alpha=0.16, linewidth=0, label=zones[1][2])
    names = short_names(scores.sites)
    for zone, colour, _ in zones:
        _label_points(axes, [(names[i], x[i], y[i]) for i in zone[:6]], colour)
    _colour_bar(figure, points, axes, "depth (group index)", 4.2)
    axes.set_xlabel(f"contribution φ, even share = 1 ({plain(scores.settings['estimator'])})")
    axes.set_ylabel("gradient demand Γ, even share = 1")
    axes.set_title(f"Pearson {measures.pearson(x, y)}\nSpearman {measures.spearman(x, y)}, {len(x)} groups")
    figure.legend(loc="outside lower left", fontsize=8, ncols=2)
    return _finish(figure, path)


@_styled
def prior_posterior(scores: LayerScores, plan: RankPlan, path: Path | str | None = None, fusion: str = "product") -> Figure:
    """Share of every group before training (prior π), after it (expected rank), and after the cut (rank)."""
    prior = fuse(scores.conductance, scores.gradient, fusion).numpy()
    posterior = _share([sum(site.posterior) for site in plan.sites])
    kept = _share([site.rank for site in plan.sites])
    G = len(prior)
    step = 0.19 if G <= MOST_LABELS else 15 / G
    figure, axes = _figure(6.8, 1.5 + step * G)
    y = np.arange(G)
    size = 26 * max(0.25, step / 0.19)
    axes.hlines(y, prior, posterior, color=LINE, linewidth=min(2, 12 * step), zorder=1)
    axes.scatter(prior, y, s=size, facecolor=SURFACE, edgecolor=MUTED, linewidth=1.2, label="prior π", zorder=2)
    axes.scatter(posterior, y, s=size, color=BLUE, linewidth=0, label="posterior, expected rank", zorder=3)
    axes.scatter(kept, y, s=2.3 * size, marker="|", color=VERMILION, linewidth=1.8, label="kept", zorder=4)
    axes.axvline(1 / G, color=MUTED, linewidth=0.8, linestyle=":")
    _name_ticks(axes.yaxis, short_names(scores.sites), 0)
    # shares are squares of distances on the axis: one large group would press all others against zero
    largest = max(prior.max(), posterior.max(), kept.max())
    axes.set_xscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
    axes.set_xlim(0, 1.1 * largest)
    ticks = [0.0]
    for tick in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1):
        if tick <= largest and np.sqrt(tick) - np.sqrt(ticks[-1]) > 0.1 * np.sqrt(largest):
            ticks.append(tick)
    axes.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    axes.set(ylim=(G - 0.5, -0.5), xlabel="share of all ranks, square-root scale (dotted: an even share)")
    figure.legend(loc="outside upper left", ncols=3, fontsize=8)
    return _finish(figure, path)


@_styled
def gate_probabilities(plan: RankPlan, path: Path | str | None = None) -> Figure:
    """Posterior of every gate, group by group: kept and dropped."""
    names = short_names(site.name for site in plan.sites)
    G = len(names)
    figure, axes = _figure(min(10.0, max(6.4, 2 + 0.17 * G)), 3.0 + 0.09 * max(map(letters, names)))
    axes.axhspan(*measures.COIN_FLIP, color=MUTED, alpha=0.16, linewidth=0, label="coin flips")
    groups = np.repeat(np.arange(G), [len(site.posterior) for site in plan.sites])
    p, mask = np.array(measures.all_gates(plan), float).reshape(-1, 2).T
    for kept, colour, label in ((True, BLUE, "kept"), (False, VERMILION, "dropped")):
        chosen = mask == kept
        marker = {"marker": "o" if kept else "x", "linewidth": 0 if kept else 0.8, "s": 9 if kept else 11}
        axes.scatter(groups[chosen], p[chosen], color=colour, alpha=0.7, label=f"{label} ({chosen.sum():,})", **marker)
    _name_ticks(axes.xaxis, names, 0)
    axes.tick_params(axis="x", rotation=90)
    axes.set(ylabel="gate probability", ylim=(-0.03, 1.03), xlim=(-0.7, G - 0.3))
    figure.legend(loc="outside lower left", ncols=3, fontsize=8)
    return _finish(figure, path)


@_styled
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
    size = min(14.0, 0.6 + max(1.2, (0.14 if len(names) <= MOST_LABELS else 0.02) * len(names)))
    figure, (above, below) = _figure(7.2, 3.4 + size, 2, height_ratios=(2.6, size), sharex=True)
    thin = _every(len(steps), MOST_POINTS)
    for kept_here, colour, label in ((True, BLUE, "kept"), (False, VERMILION, "dropped")):
        chosen = np.flatnonzero(mask == kept_here)
        if not len(chosen):
            continue
        low, middle, high = np.quantile(p[:, chosen], (0.1, 0.5, 0.9), axis=1)
        lines = chosen[np.unique(np.linspace(0, len(chosen) - 1, MOST_LINES // 2).astype(int))]
        above.plot(steps[thin], p[thin][:, lines], color=colour, alpha=0.25, linewidth=0.5)
        above.fill_between(steps[thin], low[thin], high[thin], color=colour, alpha=0.18, linewidth=0)
        text = f"{label} ({len(chosen):,}): median, 10–90 %" if plan is not None else "all gates: median, 10–90 %"
        above.plot(steps[thin], middle[thin], color=colour, linewidth=2, label=text)
    above.set(ylabel="gate probability", ylim=(-0.03, 1.03))
    expected = np.array([[sum(row[name]) for name in names] for row in gates.values()])[_every(len(steps), 200)].T
    shown = steps[_every(len(steps), 200)]
    # the image needs equal columns; steps are logged at equal distances, but for the last
    image = below.imshow(
        expected,
        aspect="auto",
        cmap="viridis",
        interpolation="nearest",
        extent=(shown[0], max(shown[-1], shown[0] + 1), len(names) - 0.5, -0.5),
    )
    _name_ticks(below.yaxis, short_names(names), 0, most=int(size / 0.12))
    below.set(xlabel="step", ylabel="group")
    _colour_bar(figure, image, below, "expected rank", size)
    _mark_cut((above, below), cut)
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=8)
    return _finish(figure, path)


@_styled
def series_panels(
    panels: dict[str, tuple[Sequence[float], Sequence[float]]],
    cut: int | None = None,
    path: Path | str | None = None,
    smooth: bool = True,
) -> Figure:
    """One panel above the other, label -> (steps, values); with `smooth` the mean of 20 logged steps over the raw values."""
    figure, axes = _figure(6.8, 0.7 + 1.7 * len(panels), len(panels), sharex=True)
    axes = np.atleast_1d(axes)
    for one, (label, (steps, values)), colour in zip(axes, panels.items(), (BLUE, VERMILION, GREEN, PURPLE) * 8, strict=False):
        steps, values = np.asarray(steps), np.asarray(values, float)
        thin = _every(len(steps), MOST_POINTS)
        mean, at = _smooth(steps, values, cut) if smooth else (values[:0], steps[:0])
        raw = {"alpha": 0.35, "linewidth": 0.7} if len(mean) else {"linewidth": 1.6}
        one.plot(steps[thin], values[thin], color=colour, marker="o" if len(values) == 1 else None, **raw)
        if len(mean):
            shown = _every(len(mean), MOST_POINTS)
            one.plot(at[shown], mean[shown], color=colour)
        one.set_ylabel(label)
        one.grid(axis="y", color=LINE, linewidth=0.6)
        one.set_axisbelow(True)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _mark_cut(axes, cut)
    figure.align_ylabels(axes)
    return _finish(figure, path)


@_styled
def reliability(bins: Sequence[Bin], path: Path | str | None = None) -> Figure:
    """Accuracy against confidence with 95 % intervals, and how many examples stand behind each point."""
    figure, (above, below) = _figure(4.8, 5.4, 2, height_ratios=(4, 1), sharex=True)
    shown = [b for b in bins if b.count]
    x, y = [b.confidence for b in shown], [b.accuracy for b in shown]
    bounds = np.array([measures.wilson(b.accuracy, b.count) for b in shown]).reshape(-1, 2).T
    above.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
    above.errorbar(x, y, np.abs(bounds - np.array(y)), color=BLUE, marker="o", markersize=4, linewidth=1.4, elinewidth=0.9)
    above.set(ylabel="accuracy", ylim=(-0.03, 1.03), title=f"Expected calibration error {measures.calibration_error(bins):.3f}")
    below.bar(x, [b.count for b in shown], width=0.6 / max(10, len(shown)), color=BLUE, alpha=0.6)
    below.set(xlabel="confidence", ylabel="examples", xlim=(-0.03, 1.03))
    return _finish(figure, path)


@_styled
def loss_curves(curves: dict[str, list[float]], path: Path | str | None = None, cut: int | None = None) -> Figure:
    """Training losses by step, smoothed over 20 steps, with the raw values behind.

    cut: the step at which ranks were cut
    """
    figure, axes = _figure(6.6, 4.2)
    for (label, values), colour in zip(curves.items(), (BLUE, VERMILION, GREEN, PURPLE), strict=False):
        axes.plot(values, color=colour, alpha=0.2, linewidth=0.7)
        window = min(20, len(values))
        axes.plot(np.arange(window - 1, len(values)), _running_mean(np.array(values), window), color=colour, label=plain(label))
    axes.set(xlabel="step", ylabel="training loss")
    _mark_cut((axes,), cut)
    axes.legend()
    return _finish(figure, path)


def render(figure: Figure, kind: str) -> bytes:
    """The bytes of a PNG or SVG file, the same for the same figure."""
    metadata = {"svg": {"Date": None, "Creator": None}, "png": {"Software": f"matplotlib {matplotlib.__version__}"}}.get(kind)
    data = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script the font lacks prints as boxes
        figure.savefig(data, format=kind, metadata=metadata)
    return data.getvalue()


def _figure(width: float, height: float, rows: int = 1, **settings) -> tuple[Figure, Axes]:
    # Figure, not pyplot: no global state, no display needed
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    return figure, figure.subplots(rows, **settings)


def _finish(figure: Figure, path: Path | str | None) -> Figure:
    if path is not None:
        storage.write_bytes(path, render(figure, Path(path).suffix.lstrip(".").lower() or "png"))
    return figure


def _colour_bar(figure: Figure, shown, axes: Axes, label: str, height: float, **settings) -> None:
    """A bar of the same width whatever its height in inches."""
    figure.colorbar(shown, ax=axes, label=label, aspect=max(6, 7 * height), **settings).outline.set_visible(False)


def _name_ticks(axis, names: list[str], offset: float, most: int = MOST_LABELS) -> None:
    """A tick a name, or every n-th where they would touch."""
    every = -(-len(names) // most)
    axis.set_ticks(np.arange(0, len(names), every) + offset, names[::every], fontsize=7 if len(names) > 12 else 8)


def _mark_cut(panels: Sequence[Axes], cut: int | None) -> None:
    if cut is None:
        return
    for axes in panels:
        axes.axvline(cut, color=MUTED, linestyle="--", linewidth=1)
    where = {"xy": (cut, 1), "xycoords": ("data", "axes fraction"), "xytext": (0, 2), "textcoords": "offset points"}
    panels[0].annotate("ranks cut", ha="center", va="bottom", fontsize=8, color=MUTED, **where)


def _label_points(axes: Axes, points: list[tuple[str, float, float]], colour: str) -> None:
    """Names beside points, moved down until they do not touch one that is there."""
    placed: list[tuple[float, float]] = []
    for name, x, y in sorted(points, key=lambda point: -point[2]):
        across, up = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
        down = 0.0
        while any(abs(across - a) < 0.3 and abs(up - down - u) < 0.032 for a, u in placed):
            down += 0.008
        placed.append((across, up - down))
        ground = {"facecolor": SURFACE, "alpha": 0.75, "linewidth": 0, "pad": 0.8}
        where = {"xytext": (across + 0.015, up - down), "textcoords": "axes fraction", "va": "center"}
        axes.annotate(name, (x, y), **where, fontsize=7, color=colour, bbox=ground, zorder=5)


def _smooth(steps: np.ndarray, values: np.ndarray, cut: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Running mean and its steps; never across the cut, where the objective changes: the line has a gap there."""
    window = min(20, len(values) // 3)
    if window < 2:
        return values[:0], steps[:0]
    parts, middle = [], len(steps) if cut is None else int(np.searchsorted(steps, cut))
    for span in (slice(0, middle), slice(middle, None)):
        if len(values[span]) >= window:
            parts += [(_running_mean(values[span], window), steps[span][window - 1 :]), (np.array([np.nan]), steps[-1:])]
    mean, at = (np.concatenate(both) for both in zip(*parts[:-1], strict=True)) if parts else (values[:0], steps[:0])
    return mean, at


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    return np.convolve(values, np.full(window, 1 / window), mode="valid")


def _every(count: int, most: int) -> np.ndarray:
    """Indices of at most `most` of them, first and last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


def _share(values: list[float]) -> np.ndarray:
    total = sum(values)
    return np.array(values, float) / total if total else np.zeros(len(values))
