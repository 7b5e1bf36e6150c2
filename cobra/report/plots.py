"""The figures of a run, each a function of what was measured; with a path the figure is written there and closed."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from cobra.plan import RankPlan
from cobra.scores import LayerScores
from cobra.sites import block_of

CONTRIBUTION, GRADIENT = "#2f6b9a", "#c8553d"


def rank_heatmap(plan: RankPlan, path: Path | str | None = None) -> Figure:
    """Rank of every layer: blocks down, modules across; blank where the model has no such layer."""
    ranks = plan.ranks
    blocks = list(dict.fromkeys(block_of(name) for name in ranks))
    modules = list(dict.fromkeys(_within_block(name) for name in ranks))
    grid = np.full((len(blocks), len(modules)), np.nan)
    for name, rank in ranks.items():
        grid[blocks.index(block_of(name)), modules.index(_within_block(name))] = rank
    figure, axes = _figure(2.6 + 0.75 * len(modules), 1.8 + 0.34 * len(blocks))
    image = axes.imshow(grid, cmap="viridis", aspect="auto", vmin=0)
    axes.set_xticks(range(len(modules)), modules, rotation=35, ha="right")
    axes.set_yticks(range(len(blocks)), [_short_block(b) for b in blocks])
    middle = np.nanmax(grid) / 2 if np.isfinite(grid).any() else 0
    for (i, j), rank in np.ndenumerate(grid):
        if np.isfinite(rank):
            axes.text(j, i, f"{rank:.0f}", ha="center", va="center", fontsize=8, color="white" if rank < middle else "black")
    figure.colorbar(image, ax=axes, label="rank")
    axes.set_title(f"{plan.total} ranks, {plan.parameters:,} parameters")
    axes.set_ylabel("block")
    return _finish(figure, path)


def factor_scatter(scores: LayerScores, path: Path | str | None = None) -> Figure:
    """Gradient demand against contribution, a point a group; the names of those farthest from agreement."""
    figure, axes = _figure(6.2, 4.8)
    phi, gamma = scores.conductance.numpy(), scores.gradient.numpy()
    points = axes.scatter(phi, gamma, c=np.arange(len(phi)), cmap="viridis", s=28)
    if (phi > 0).all() and (gamma > 0).all():
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    disagreement = np.abs(np.argsort(np.argsort(phi)) - np.argsort(np.argsort(gamma)))
    for i in np.argsort(-disagreement, kind="stable")[:5]:
        axes.annotate(_short(scores.sites[i]), (phi[i], gamma[i]), fontsize=7, xytext=(4, 3), textcoords="offset points")
    figure.colorbar(points, ax=axes, label="depth (group index)")
    axes.set_xlabel(f"contribution φ ({scores.settings['estimator']})")
    axes.set_ylabel("gradient demand Γ")
    axes.set_title(f"Pearson correlation {scores.correlation:.2f} over {len(phi)} groups")
    return _finish(figure, path)


def gate_probabilities(plan: RankPlan, path: Path | str | None = None) -> Figure:
    """Posterior of every gate, group by group: kept and dropped."""
    figure, axes = _figure(max(6.2, 2 + 0.17 * len(plan.sites)), 4.4)
    for kept, colour, label in ((True, CONTRIBUTION, "kept"), (False, GRADIENT, "dropped")):
        points = [
            (i, p) for i, site in enumerate(plan.sites) for k, p in enumerate(site.posterior) if (k in set(site.kept)) is kept
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), s=7, color=colour, alpha=0.6, label=f"{label} ({len(points)})")
    axes.set_xticks(range(len(plan.sites)), [_short(s.name) for s in plan.sites], rotation=90, fontsize=6)
    axes.set_ylabel("gate probability")
    axes.set_title("Posterior of the rank gates")
    axes.legend(frameon=False)
    return _finish(figure, path)


def loss_curves(curves: dict[str, list[float]], path: Path | str | None = None, cut: int | None = None) -> Figure:
    """Training losses by step, smoothed over 20 steps, with the raw values behind.

    cut: the step at which ranks were cut
    """
    figure, axes = _figure(6.6, 4.2)
    for (label, values), colour in zip(curves.items(), (CONTRIBUTION, GRADIENT, "#5b8c5a", "#7b5ea7"), strict=False):
        axes.plot(values, color=colour, alpha=0.18, linewidth=0.7)
        window = min(20, len(values))
        smooth = np.convolve(values, np.full(window, 1 / window), mode="valid")
        axes.plot(np.arange(window - 1, len(values)), smooth, color=colour, label=label)
    if cut is not None:
        axes.axvline(cut, color="grey", linestyle=":", label="ranks cut")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.legend(frameon=False)
    return _finish(figure, path)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Figure, not pyplot: no global state, no display needed
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(figure: Figure, path: Path | str | None) -> Figure:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Software": f"matplotlib {matplotlib.__version__}"} if str(path).endswith(".png") else None
        figure.savefig(path, metadata=metadata)
    return figure


def _within_block(name: str) -> str:
    block = block_of(name)
    return name[len(block) :].lstrip(".") or name


def _short_block(block: str) -> str:
    numbers = re.findall(r"\d+", block)
    return numbers[-1] if numbers and re.search(r"\d+$", block) else block


def _short(name: str) -> str:
    block = block_of(name)
    return name if block == name else f"{_short_block(block)}.{_within_block(name)}"
