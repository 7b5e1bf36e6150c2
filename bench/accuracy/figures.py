"""The figures of docs/evidence.md. Each is two functions: rows to points (plain numbers), and points to a figure.

Colours keep a contrast of 3 with white and with GitHub's dark page, text one of 4; the ground is transparent.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from bench.accuracy.cells import Cell, of_phase, sort_methods
from bench.accuracy.statistics import Summary, candidates
from cobra import storage

INK, FAINT = "#757c85", "#7f868e"
# method: colour, marker, line
STYLES = {
    "lora": ("#7f868e", "o", "-"),
    "rslora": ("#7f868e", "s", ":"),
    "loraplus": ("#7f868e", "^", "--"),
    "dora": ("#a06cd5", "D", "-."),
    "eva": ("#b07d12", "v", "--"),
    "adalora": ("#d55e00", "s", "-"),
    "uniform": ("#3f8f5f", "^", ":"),
    "random": ("#3f8f5f", "v", "--"),
    "plan": ("#2e86c1", "D", "--"),
    "singular": ("#2e86c1", "v", "-."),
    "paper": ("#2e86c1", "s", ":"),
    "cobra": ("#2e86c1", "o", "-"),
    "cobra+quick": ("#2e86c1", "D", ":"),
    "cobra+long": ("#2e86c1", "X", "-."),
    "cobra+long+quick": ("#2e86c1", "P", ":"),
    "cobra+singular": ("#2e86c1", "^", "--"),
    "full": ("#7f868e", "X", ":"),
}
OTHER = ("#c2558f", "X", "-")
FURTHEST = 25  # points or per cent that differences are drawn to: one run that collapsed would hide all others
STYLE = {
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "cobra",
    "text.color": INK,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
}
ACROSS = 3
Points = list[dict]


def accuracy_by_rank(rows: Sequence[dict], summary: Summary) -> Points:
    """Level and interval of every method, by task and rank, in the usual conditions."""
    return [
        {"panel": _panel(summary, cell), "kind": summary.kind(cell), "method": method, "rank": cell.rank}
        | _rounded(mean=found.mean, low=found.low, high=found.high)
        for (cell, method), found in sorted(summary.levels.items(), key=lambda item: item[0])
        if not cell.condition
    ]


def draw_accuracy_by_rank(points: Points) -> Figure:
    panels = sorted({(p["kind"], p["panel"]) for p in points})
    methods = sort_methods(p["method"] for p in points)
    figure, axes = _grid(len(panels), 2.6)
    for axis, (kind, panel) in zip(axes, panels, strict=True):
        here = [p for p in points if p["panel"] == panel]
        scale = 100 if kind == "classification" else 1
        for place, method in enumerate(methods):
            mine = sorted((p for p in here if p["method"] == method), key=lambda p: p["rank"])
            # side by side, so that intervals can be told apart
            x = [p["rank"] * 2 ** (0.5 * ((place + 0.5) / len(methods) - 0.5)) for p in mine]
            _line_with_intervals(axis, method, x, mine, scale)
        axis.set_xscale("log", base=2)
        _ticks(axis, sorted({p["rank"] for p in here}))
        axis.set(
            title=panel, xlabel="rank", ylabel={"classification": "test accuracy, %", "regression": "test MSE"}.get(kind, "NLL")
        )
    _legend(figure, axes, methods)
    return figure


def differences(rows: Sequence[dict], summary: Summary) -> Points:
    """Gains over LoRA with intervals, and whether they are significant after Holm's correction."""
    return [
        {"method": c.method, "kind": c.kind, "label": f"{_panel(summary, c.cell)}, r = {c.cell.rank:.2g}"}
        | {"verdict": c.verdict, "order": [c.cell.model, c.cell.condition, c.cell.task, c.cell.rank]}
        | _rounded(mean=100 * c.gain.mean, low=100 * c.gain.low, high=100 * c.gain.high)
        for c in summary.comparisons
    ]


def draw_differences(points: Points) -> Figure:
    """Methods across, cells down; filled marks are significant. What lies further from 0 than `FURTHEST` is at the edge."""
    kinds, methods = sorted({p["kind"] for p in points}), sort_methods(p["method"] for p in points)
    labels = {kind: [] for kind in kinds}
    for point in sorted(points, key=lambda p: p["order"]):
        if point["label"] not in labels[point["kind"]]:
            labels[point["kind"]].append(point["label"])
    lengths = [len(labels[kind]) for kind in kinds]
    figure = Figure(
        figsize=(1.6 + 1.7 * len(methods), 0.9 + 0.19 * sum(lengths) + 0.7 * len(kinds)), layout="constrained", dpi=150
    )
    axes = figure.subplots(
        len(kinds), len(methods), squeeze=False, sharex="row", sharey="row", gridspec_kw={"height_ratios": lengths}
    )
    for row, kind in zip(axes, kinds, strict=True):
        for axis, method in zip(row, methods, strict=True):
            mine = [p for p in points if (p["method"], p["kind"]) == (method, kind)]
            axis.axvline(0, color=FAINT, linewidth=0.8)
            for point in mine:
                _forest_mark(axis, point, labels[kind].index(point["label"]))
            axis.set(title=method, xlabel="points" if kind == "classification" else "% less loss")
        low, high = row[0].get_xlim()
        row[0].set_xlim(max(low, -1.05 * FURTHEST), min(high, 1.05 * FURTHEST))
        row[0].yaxis.set_major_locator(FixedLocator(range(len(labels[kind]))))
        row[0].set(yticklabels=labels[kind], ylim=(len(labels[kind]) - 0.5, -0.5))
    return figure


def learning_rates(rows: Sequence[dict], summary: Summary) -> Points:
    """Validation by learning rate, of the best other settings at that rate; runs that diverged leave a gap."""
    kinds = {row["task"]: row["kind"] for row in of_phase(rows, "search")}
    best = {}
    for choice, tried in candidates(rows, "per task").items():
        for candidate in reversed(tried):
            value = candidate.values[choice.task]
            if value is not None:
                best[choice, candidate.config["lr"]] = value
    several = len({choice.model for choice, _ in best}) > 1
    return [
        {"panel": _joined(choice.task, f"r = {choice.rank:g}", choice.condition, choice.model if several else "")}
        | {"kind": kinds[choice.task]}
        | {"method": choice.method, "lr": lr}
        | _rounded(value=value)
        for (choice, lr), value in sorted(best.items(), key=lambda item: (str(item[0][0]), item[0][1]))
    ]


def draw_learning_rates(points: Points) -> Figure:
    panels = sorted({(p["kind"], p["panel"]) for p in points})
    methods = sort_methods(p["method"] for p in points)
    figure, axes = _grid(len(panels), 2.4)
    for axis, (kind, panel) in zip(axes, panels, strict=True):
        here = [p for p in points if p["panel"] == panel]
        for method in methods:
            mine = sorted((p for p in here if p["method"] == method), key=lambda p: p["lr"])
            colour, marker, line = STYLES.get(method, OTHER)
            scale = 100 if kind == "classification" else 1
            axis.plot(
                [p["lr"] for p in mine],
                [scale * p["value"] for p in mine],
                color=colour,
                marker=marker,
                linestyle=line,
                markersize=4,
            )
        axis.set_xscale("log")
        _ticks(axis, sorted({p["lr"] for p in here}))
        axis.set(title=panel, xlabel="learning rate", ylabel="accuracy, %" if kind == "classification" else "loss")
    _legend(figure, axes, methods)
    return figure


FIGURES = {
    "accuracy-by-rank": (
        accuracy_by_rank,
        draw_accuracy_by_rank,
        "Test results by rank, with 95 % intervals over seeds and examples",
    ),
    "differences": (
        differences,
        draw_differences,
        "Gains over LoRA, with 95 % intervals; filled: significant after Holm's correction; arrows: beyond the axis",
    ),
    "learning-rates": (learning_rates, draw_learning_rates, "Validation results by learning rate"),
}


def digest(points: Points) -> str:
    """Of the numbers drawn; the SVG carries it."""
    return hashlib.sha256(json.dumps(points, sort_keys=True).encode()).hexdigest()[:16]


def write(name: str, points: Points, folder: Path) -> None:
    """`name`.svg and `name`.png."""
    with matplotlib.rc_context(STYLE):
        figure = FIGURES[name][1](points)
        for kind, metadata in (
            ("svg", {"Date": None, "Creator": None, "Description": f"points {digest(points)}"}),
            ("png", None),
        ):
            data = io.BytesIO()
            figure.savefig(data, format=kind, metadata=metadata)
            storage.write_bytes(folder / f"{name}.{kind}", data.getvalue())


def is_current(name: str, points: Points, folder: Path) -> bool:
    """Whether the SVG in the folder shows these points."""
    path = folder / f"{name}.svg"
    return path.is_file() and f"points {digest(points)}" in path.read_text(encoding="utf-8")


def _panel(summary: Summary, cell: Cell) -> str:
    several = len({cell.model for cell in summary.runs}) > 1
    return _joined(cell.task, cell.model if several else "", cell.condition)


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _rounded(**values: float) -> dict[str, float | None]:
    """Five digits, so that other machines' last bits make no other figure; None for NaN, which JSON lacks."""
    return {name: None if math.isnan(value) else float(f"{value:.5g}") for name, value in values.items()}


def _grid(panels: int, height: float) -> tuple[Figure, list[Axes]]:
    # Figure, not pyplot: no global state, no display needed
    rows, columns = math.ceil(panels / ACROSS), min(panels, ACROSS)
    figure = Figure(figsize=(2.9 * columns + 0.4, height * rows + 0.5), layout="constrained", dpi=150)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for spare in axes[panels:]:
        spare.remove()
    return figure, axes[:panels]


def _line_with_intervals(axis: Axes, method: str, x: Sequence[float], points: Points, scale: float) -> None:
    colour, marker, line = STYLES.get(method, OTHER)
    axis.plot(x, [scale * p["mean"] for p in points], color=colour, marker=marker, linestyle=line, markersize=4, linewidth=1.2)
    known = [(at, p) for at, p in zip(x, points, strict=True) if p["low"] is not None]
    axis.vlines(
        [at for at, _ in known],
        [scale * p["low"] for _, p in known],
        [scale * p["high"] for _, p in known],
        colour,
        linewidth=1,
    )


def _forest_mark(axis: Axes, point: dict, place: int) -> None:
    colour, marker, _ = STYLES.get(point["method"], OTHER)
    if point["low"] is not None:
        axis.hlines(place, max(point["low"], -FURTHEST), min(point["high"], FURTHEST), colour, linewidth=1.2)
    face = colour if point["verdict"] in ("win", "loss") else "none"
    mean = max(-FURTHEST, min(FURTHEST, point["mean"]))
    marker = marker if mean == point["mean"] else "<" if mean < 0 else ">"
    axis.plot(mean, place, marker=marker, markersize=4.5, color=colour, markerfacecolor=face, linestyle="none")


def _ticks(axis: Axes, values: Sequence[float]) -> None:
    axis.xaxis.set_major_locator(FixedLocator(values))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xticklabels(_labels(values))


def _labels(values: Sequence[float]) -> list[str]:
    """Of ticks on a logarithmic axis, those left out for which there is no room beside the last."""
    room, last, labels = math.log(values[-1] / values[0]) / 4, -math.inf, []
    for value in values:
        shown = math.log(value) - last >= room
        labels.append(f"{value:.2g}" if shown else "")
        last = math.log(value) if shown else last
    return labels


def _legend(figure: Figure, axes: Sequence[Axes], methods: Sequence[str]) -> None:
    styles = [STYLES.get(method, OTHER) for method in methods]
    handles = [axes[0].plot([], [], color=c, marker=m, linestyle=l, markersize=4)[0] for c, m, l in styles]
    figure.legend(handles, methods, loc="outside lower center", ncols=min(len(methods), 6))
