"""Figures: sizes that open whatever the model, type that can be read, and marks that say what they stand for."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.text import Text
from reports import CUT, made_run, whole_run

import cobra
from cobra.report import plots
from cobra.report.names import grid
from cobra.report.plots import canvas
from cobra.report.plots.training import _smooth
from cobra.report.run import Bin, Run

STACKS = {
    "blocks": "model.layers.{}.{}",
    "no grid": "{1}{0}",
    "experts": "model.layers.0.experts.{}.{}",
    "thousands": "model.layers.{}.experts.{}.up",
    "thousands, list": "l{}x{}",
}


@pytest.fixture
def run(tmp_path):
    return Run.load(whole_run(tmp_path))


def drawn(run) -> dict:
    return {
        "ranks": plots.rank_heatmap(run.plan),
        "prior": plots.prior_posterior(run.scores, run.plan),
        "gates": plots.gate_probabilities(run.plan),
        "factors": plots.factor_scatter(run.scores),
        "trajectories": plots.gate_trajectories(run.gates, run.plan, CUT),
        "series": plots.series_panels({"nll": ([0, 1, 2], [3.0, 2.0, 1.0])}, CUT),
        "reliability": plots.reliability(run.bins),
        "merge": plots.merge_updates(run.merge),
    }


def test_type_can_be_read(run):
    """Nothing is smaller than the page counts on, and every axis says what it shows."""
    for name, figure in drawn(run).items():
        sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()]
        assert min(sizes) >= canvas.SMALLEST_TYPE, name
        labels = [axes.get_ylabel() or axes.get_xlabel() for axes in figure.axes]
        assert all(labels) or name == "ranks", name


def test_many_gates(tmp_path):
    """Of 81 groups two marks each: the median of the kept and of the dropped, and nothing for a kind that is not there."""
    plan = cobra.RankPlan.load(made_run(tmp_path, [f"l{i}" for i in range(81)], kept=3) / "plan.json")
    marks = [c.get_offsets() for c in plots.gate_probabilities(plan).axes[0].collections if isinstance(c, PathCollection)]
    assert [len(one) for one in marks] == [81, 81]
    assert [np.unique(one[:, 1]).round(6).tolist() for one in marks] == [[0.7], [0.3]]
    plan = cobra.RankPlan.load(made_run(tmp_path, [f"l{i}" for i in range(81)], kept=0) / "plan.json")
    assert len(plots.gate_probabilities(plan).axes[0].get_legend_handles_labels()[1]) == 3


@pytest.mark.parametrize("stack", STACKS)
def test_many_layers(tmp_path, stack):
    """Sizes that open, whatever the names; every layer has its place."""
    modules = range(80) if stack.startswith("thousands") else ("q", "k", "v", "up", "down")
    names = [STACKS[stack].format(i, m) for i in range(40) for m in modules]
    run = Run.load(made_run(tmp_path, names, gates=2))
    figures = [plots.rank_heatmap(run.plan), plots.prior_posterior(run.scores, run.plan), plots.gate_probabilities(run.plan)]
    assert all(1 < side < 20 for figure in figures for side in figure.get_size_inches())
    assert np.isfinite(grid(run.plan.ranks).values).sum() == len(names)


def test_full_layers_are_bold(tmp_path):
    plan = cobra.RankPlan.load(made_run(tmp_path, ["h.0.q", "h.0.v"], kept=4) / "plan.json")
    texts = plots.rank_heatmap(plan).axes[0].texts
    assert [(t.get_text(), t.get_fontweight()) for t in texts] == [("4", "bold")] * 2
    plan = cobra.RankPlan.load(made_run(tmp_path, ["h.0.q", "h.0.v"], kept=2) / "plan.json")
    assert {t.get_fontweight() for t in plots.rank_heatmap(plan).axes[0].texts} == {"normal"}


def test_no_posterior_without_training(tmp_path):
    """Gates of a plan from scores were never trained: their probability is no result."""
    for source, labels in (("gates", ["prior π", "expected rank", "kept"]), ("scores", ["prior π", "kept"])):
        run = Run.load(made_run(tmp_path, ["up", "mid"], source=source))
        found = plots.prior_posterior(run.scores, run.plan).legends[0]
        assert [text.get_text() for text in found.get_texts()] == labels


def test_every_gate_is_seen(tmp_path):
    """Equal gates of a group stand beside one another."""
    plan = cobra.RankPlan.load(made_run(tmp_path, ["up", "mid"], gates=4) / "plan.json")
    points = np.concatenate([c.get_offsets() for c in plots.gate_probabilities(plan).axes[0].collections])
    assert len(points) == len({tuple(point) for point in points.tolist()}) == 8
    assert sorted(set(points[:, 0].round())) == [0, 1]


def test_bars_do_not_touch(run):
    bins = [Bin(0.5 + 0.05 * k, 0.6, 10) for k in range(10)]
    bars = plots.reliability(bins).axes[1].patches
    assert all(a.get_x() + a.get_width() < b.get_x() for a, b in pairwise(bars))


def test_running_mean_stops_at_the_cut():
    """A gap there, and no value that mixes both sides."""
    steps, values = np.arange(60), np.where(np.arange(60) < 30, 1.0, 5.0)
    mean = _smooth(steps, values, 30)[1]
    assert set(mean[np.isfinite(mean)].round(9)) == {1.0, 5.0} and np.isnan(mean).sum() == 1
    assert len(_smooth(steps[:4], values[:4], None)[0]) == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("phi", "gamma", "title"),
    [
        ([1.0], [1.0], "Pearson not defined"),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "Pearson not defined"),
        ([0.0, 0.0], [0.0, 0.0], "Pearson not defined"),
        ([0.0, 1.0], [1.0, 0.0], "Pearson -1.00"),
    ],
    ids=["one layer", "no spread", "zeros", "disjoint"],
)
def test_no_correlation(tmp_path, phi, gamma, title):
    """Words where there is no number, and no warning on the way to the file."""
    scores = Run.load(made_run(tmp_path, ["up", "mid", "down"][: len(phi)], phi, gamma)).scores
    figure = plots.factor_scatter(scores, tmp_path / "factors.png")
    assert figure.axes[0].get_title("left").startswith(title)
    assert (tmp_path / "factors.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
