"""Intervals and tests against textbook numbers, and against their promise by simulation."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from bench.accuracy.intervals import estimate, estimates, holm, mean_of, relative, seeds_estimate


def draw(rng, seeds, examples, seed_sd, example_sd, rest_sd=0.3, mean=0.0):
    """Crossed effects of seeds and examples, and what is left."""
    by_seed, by_example = rng.normal(0, seed_sd, (seeds, 1)), rng.normal(0, example_sd, (1, examples))
    return mean + by_seed + by_example + rng.normal(0, rest_sd, (seeds, examples))


SOURCES = [(0.0, 0.0), (0.03, 0.0), (0.0, 0.3), (0.03, 0.3)]


@pytest.mark.parametrize(("seed_sd", "example_sd"), SOURCES)
def test_coverage(seed_sd, example_sd):
    """95 % intervals, to within four times the simulation's error, whatever the source of the error."""
    rng, runs, held = np.random.default_rng(5), 400, 0
    for number in range(runs):
        found = estimate(draw(rng, 5, 60, seed_sd, example_sd, mean=0.2), number, resamples=400)
        held += found.low <= 0.2 <= found.high
    assert 0.905 <= held / runs <= 0.99


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(("seed_sd", "example_sd"), [(0.03, 0.0), (0.0, 0.3)])
def test_level(seed_sd, example_sd, seeds):
    """p ≤ 0.05 in 5 %, p ≤ 0.01 in 1 % of draws without a difference; four times the simulation's error is 2.2 and 1 points."""
    rng = np.random.default_rng(5)
    found = np.array([estimate(draw(rng, seeds, 60, seed_sd, example_sd), resamples=2).p for _ in range(1600)])
    assert abs((found <= 0.05).mean() - 0.05) < 0.022
    assert (found <= 0.01).mean() < 0.02


def test_t_over_seeds_fails_where_examples_matter():
    """Why `p` and not `p_seeds` decides: with error from the choice of examples alone, the latter rejects far too often."""
    rng = np.random.default_rng(1)
    found = [estimate(draw(rng, 5, 100, 0.0, 0.5), resamples=2) for _ in range(300)]
    assert np.mean([f.p_seeds < 0.05 for f in found]) > 0.15
    assert np.mean([f.p < 0.05 for f in found]) < 0.09


def test_bootstrap_p_is_near_uniform_under_the_null():
    rng = np.random.default_rng(2)
    found = np.array([estimate(draw(rng, 5, 60, 0.03, 0.3), i, resamples=300).p_bootstrap for i in range(500)])
    for level in (0.05, 0.25, 0.5, 0.75):
        assert abs((found <= level).mean() - level) < 0.09


def test_p_over_seeds_is_the_paired_t():
    rng = np.random.default_rng(3)
    ours, theirs = rng.random((5, 40)) < 0.85, rng.random((5, 40)) < 0.75
    expected = stats.ttest_rel(ours.mean(1), theirs.mean(1)).pvalue
    assert estimate(ours.astype(float) - theirs).p_seeds == pytest.approx(expected)


def test_analysis_of_variance_by_hand():
    """2 × 2: seed means 1 and 3, example means 1 and 3, no interaction: MS_a = MS_b = 4, MS_e = 0."""
    found = estimate(np.array([[0.0, 2.0], [2.0, 4.0]]))
    assert found.mean == 2
    assert found.seed_variance == pytest.approx(4 / 4)
    assert found.variance == pytest.approx((4 + 4) / 4)
    assert found.df == pytest.approx(8**2 / 4**2)
    assert found.p_seeds == pytest.approx(2 * stats.t.sf(2, 1))
    assert found.p == found.p_seeds > 2 * stats.t.sf(2 / math.sqrt(2), 4)


def test_examples_decide_where_they_vary_more():
    """Seed means 1.9 and 2.1, example means 0 and 4: the variance of examples is what makes the difference uncertain."""
    found = estimate(np.array([[-0.1, 3.9], [0.1, 4.1]]))
    assert found.variance == pytest.approx(0.2**2 / 2 / 2 + 4**2 / 2 / 2)
    assert found.df == pytest.approx(found.variance**2 / 0.01**2)
    assert found.p == pytest.approx(2 * stats.t.sf(2 / math.sqrt(found.variance), found.df))
    assert found.p > found.p_seeds


def test_equal_gains_of_other_examples_are_no_certainty():
    """Two examples of 500 on each of two seeds: what counts do by chance where methods are alike."""
    matrix = np.zeros((2, 500))
    matrix[0, :2] = matrix[1, 2:4] = 1
    found = estimate(matrix)
    assert found.p > 0.2 and found.low < 0 < found.high
    rng = np.random.default_rng(7)
    draws = (rng.random((1500, 2, 200)) < 0.03) * rng.choice([-1.0, 1.0], (1500, 2, 200))
    p_values = np.array([estimate(each, resamples=2).p for each in draws])
    assert (p_values <= 0.01).mean() < 0.02 and (p_values <= 0.05).mean() < 0.07


def test_interaction_alone_adds_nothing_for_examples():
    found = estimate(np.array([[0.0, 1.0], [1.0, 0.0], [0.2, 0.7]]))
    assert found.variance == found.seed_variance
    assert found.df == 2


def test_interval_of_seeds_alone_is_students():
    values = np.array([0.80, 0.82, 0.81, 0.85, 0.79])
    found = estimate(np.repeat(values[:, None], 30, 1), resamples=50_000)
    half = stats.t.ppf(0.975, 4) * values.std(ddof=1) / math.sqrt(5)
    assert found.half == pytest.approx(half, rel=0.08)
    assert seeds_estimate(values).half == pytest.approx(half)


def test_same_seed_same_interval_whatever_stands_beside():
    rng = np.random.default_rng(4)
    first, second = draw(rng, 5, 50, 0.1, 0.1), draw(rng, 3, 50, 0.1, 0.1)
    for together, alone in zip(estimates([first, second], 7), (estimate(first, 7), estimate(second, 7)), strict=True):
        assert (together.low, together.high) == pytest.approx((alone.low, alone.high), rel=1e-9)
        assert together.p_bootstrap == alone.p_bootstrap
    assert estimate(first, 8).low != pytest.approx(estimate(first, 7).low, rel=1e-9)


def test_one_seed_has_a_mean_only():
    found = estimate(np.array([[0.0, 1.0, 1.0]]))
    assert found.mean == pytest.approx(2 / 3)
    assert all(map(math.isnan, (found.low, found.high, found.p, found.p_seeds, found.p_bootstrap)))


def test_equal_methods():
    """No difference at all, not NaN."""
    found = estimate(np.zeros((5, 20)))
    assert (found.mean, found.low, found.high, found.p, found.p_bootstrap) == (0, 0, 0, 1, 1)


@pytest.mark.parametrize("matrices", [[np.zeros(3)], [np.zeros((0, 3))], [np.zeros((2, 3)), np.zeros((2, 4))]])
def test_shapes_are_checked(matrices):
    with pytest.raises(ValueError, match="shapes"):
        estimates(matrices)


def test_no_matrices():
    assert estimates([]) == []


def test_mean_over_tasks_covers():
    rng, held, runs = np.random.default_rng(6), 0, 300
    for number in range(runs):
        tasks = [estimate(draw(rng, 5, 40, 0.05 * (1 + t), 0.2), 10 * number + t, resamples=300) for t in range(3)]
        found = mean_of(tasks)
        held += found.low <= 0 <= found.high
    assert 0.90 <= held / runs <= 0.985


def test_mean_over_tasks_by_hand():
    """Two equal tasks: half the variance, twice the degrees of freedom."""
    part = seeds_estimate([1.0, 2.0, 3.0])
    found = mean_of([part, part])
    assert found.mean == 2
    assert found.variance == pytest.approx(part.variance / 2)
    assert found.df == pytest.approx(4)
    assert found.half == pytest.approx(stats.t.ppf(0.975, 4) * math.sqrt(1 / 6))
    with pytest.raises(ValueError, match="needs an estimate"):
        mean_of([])


def test_relative_change():
    rng = np.random.default_rng(8)
    baseline, losses = rng.random((5, 50)), 0.9 * rng.random((5, 50))
    found = relative(losses, baseline)
    assert found.mean() == pytest.approx(losses.mean() / baseline.mean() - 1)
    assert relative(0.8 * baseline, baseline) == pytest.approx(np.full((5, 50), -0.2))
    with pytest.raises(ValueError, match="baseline's mean loss is 0"):
        relative(losses, np.zeros((5, 50)))


def test_relative_change_moves_with_either_side():
    """The delta method: small changes of one example change the ratio as the linear form says."""
    rng = np.random.default_rng(9)
    baseline, losses = rng.random((3, 20)), rng.random((3, 20))
    linear = relative(losses, baseline)
    weights = 1 + 1e-4 * rng.normal(size=20)
    weights /= weights.mean()
    moved = (losses * weights).mean() / (baseline * weights).mean() - 1
    assert (linear * weights).mean() - linear.mean() == pytest.approx(moved - linear.mean(), rel=1e-3)


def test_holm_by_hand():
    """Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, and never falling."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("count", [1, 2, 7, 36])
def test_holm_is_that_of_statsmodels(count):
    """With ties and values that end above 1."""
    p_values = np.random.default_rng(count).uniform(size=count).round(1)
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])


def test_holm_counts_known_values_only():
    found = holm([math.nan, 0.01, 0.5])
    assert math.isnan(found[0])
    assert found[1:] == pytest.approx([0.02, 0.5])
    assert holm([]) == []
