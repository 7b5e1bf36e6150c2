"""Figures are drawn, say which numbers they show, and are readable on light and dark pages."""

import pytest
from accuracy_rows import row

from bench.accuracy import figures
from bench.accuracy.statistics import summarise


@pytest.fixture(scope="module")
def points() -> dict[str, figures.Points]:
    rows = [row(m, t, r, s, level=0.8) for m in ("lora", "cobra") for t in ("hyper", "foods") for r in (2, 8) for s in range(2)]
    rows += [row("unheard-of")]
    rows += [row(m, "hyper", 2, 100, "search", 0.8, lr) for m in ("lora", "cobra") for lr in (0.001, 0.003)]
    rows += [row("cobra", "hyper", 2, 100, "search", lr=0.01, diverged=True)]
    summary = summarise(rows, 200)
    return {name: make(rows, summary) for name, (make, *_) in figures.FIGURES.items()}


@pytest.mark.parametrize("name", figures.FIGURES)
def test_drawn_and_current(name, points, tmp_path):
    assert not figures.is_current(name, points[name], tmp_path)
    figures.write(name, points[name], tmp_path)
    assert (tmp_path / f"{name}.png").read_bytes()[1:4] == b"PNG"
    first = (tmp_path / f"{name}.svg").read_text()
    assert "cobra" in first and "hyper" in first
    assert figures.is_current(name, points[name], tmp_path)
    assert not figures.is_current(name, points[name][1:], tmp_path)
    figures.write(name, points[name], tmp_path)
    assert (tmp_path / f"{name}.svg").read_text() == first


def test_diverged_rates_leave_gaps(points):
    drawn = [(p["method"], p["lr"]) for p in points["learning-rates"]]
    assert sorted(drawn) == [("cobra", 0.001), ("cobra", 0.003), ("lora", 0.001), ("lora", 0.003)]


def test_other_conditions_have_no_panel_of_ranks():
    rows = [row(m, steps=steps, seed=s) for m in ("lora", "cobra") for steps in (50, 200) for s in range(2)]
    summary = summarise(rows, 200)
    assert {p["panel"] for p in figures.accuracy_by_rank(rows, summary)} == {"hyper"}
    assert {p["label"] for p in figures.differences(rows, summary)} == {"hyper, r = 2", "hyper, steps 50, r = 2"}


def test_a_collapse_is_drawn_at_the_edge():
    """Its mark points outwards, and the axis stays wide enough for the others to be told apart."""
    order, common = ["minilm", "", "foods", 2], {"method": "cobra", "kind": "regression", "verdict": "tie"}
    values = {"foods": (-2.0, 2.0, 6.0), "tweets": (-900.0, -200.0, 500.0)}
    points = [{"label": k, "order": order, **common, "low": a, "mean": b, "high": c} for k, (a, b, c) in values.items()]
    (axis,) = figures.draw_differences(points).axes
    marks = {line.get_marker(): line.get_xdata()[0] for line in axis.lines if line.get_marker() != "None"}
    assert marks == {"o": 2.0, "<": -figures.FURTHEST}
    assert max(map(abs, axis.get_xlim())) < 1.1 * figures.FURTHEST


def test_labels_of_many_ticks_leave_each_other_room():
    few, many = (0.22222, 2, 8), [2.5e-5 * 2**k for k in range(10)]
    assert figures._labels(few) == ["0.22", "2", "8"] and figures._labels([8]) == ["8"]
    shown = [at for at, label in enumerate(figures._labels(many)) if label]
    assert shown == [0, 3, 6, 9]


def test_no_rows():
    assert all(make([], summarise([])) == [] for make, *_ in figures.FIGURES.values())


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_readable_on_both_pages(page):
    assert contrast(figures.INK, page) >= 4
    for colour, *_ in [*figures.STYLES.values(), figures.OTHER, (figures.FAINT,)]:
        assert contrast(colour, page) >= 3
