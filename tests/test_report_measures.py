"""Agreement of the factors, the two zones, movement of gates, and intervals, against values worked out by hand."""

import pytest
import torch
from reports import made_run

import cobra
from cobra.report import measures


def test_correlations():
    """Ties share ranks, intervals are Fisher's."""
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 4.0, 3.0, 5.0]
    r = measures.pearson(x, y)
    assert r.value == pytest.approx(0.8)
    half = 1.959964 / 2**0.5
    assert (r.low, r.high) == pytest.approx(tuple(torch.tanh(torch.tensor([1.0986123 - half, 1.0986123 + half])).tolist()))
    assert measures.spearman(x, [v**3 for v in y]).value == pytest.approx(0.8)
    assert measures.spearman([1, 1, 2], [1, 2, 3]).value == pytest.approx(3**0.5 / 2)
    assert str(measures.pearson([1, 1], [1, 2])) == "not defined (one group, or no spread)"
    assert str(measures.pearson([1, 2], [1, 2])) == "1.00"


def test_zones(tmp_path):
    """High gradient at low contribution, and the other way round; small layers belong to neither."""
    folder = made_run(tmp_path, ["red", "under", "small", "even"], phi=[1.0, 6.0, 0.1, 2.0], gamma=[6.0, 1.0, 0.9, 2.0])
    found = measures.factors(cobra.LayerScores.load(folder / "scores.safetensors"))
    assert (found.red, found.under) == ([0], [1])
    assert found.gradient.sum() == pytest.approx(4)


def test_moved():
    mean, most = measures.moved({"up": [0.5, 0.5], "mid": [0.9]}, {"mid": [0.6], "up": [0.5, 0.4]})
    assert (mean, most) == pytest.approx((0.4 / 3, 0.3))


def test_undecided():
    assert measures.undecided([0.05, 0.1, 0.5, 0.9, 0.95]) == 3


def test_wilson():
    """Never outside 0 and 1, and within them where the share is at the end."""
    assert measures.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    low, high = measures.wilson(1.0, 10)
    assert low == pytest.approx(0.7225, abs=1e-4) and high == pytest.approx(1)
