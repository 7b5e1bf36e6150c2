"""Rules on the path: what Q does to functions whose attribution is known by hand."""

import pytest
import torch
from captum.attr._utils.approximation_methods import approximation_parameters

from cobra.path import ESTIMATORS, QUADRATURES, path_rule
from cobra_kernels import conductance_reduce

CAPTUM = {"midpoint": "riemann_middle", "gausslegendre": "gausslegendre"}
EXACT_DEGREE = {
    "midpoint": lambda n: 1,
    "gausslegendre": lambda n: 2 * n - 1,
    "trapezoid": lambda n: 1,
    "lobatto": lambda n: 2 * n - 3,
}


def weights(quadrature: str, steps: int) -> torch.Tensor:
    """The quadrature weights, as the paper's rule shows them in its last column."""
    return path_rule("paper", quadrature, steps).q[:, -1]


@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_weights_integrate_polynomials(quadrature, steps):
    """Each rule is exact up to the degree its theory promises, and no weight sits where the rule has no node."""
    alphas, w = path_rule("paper", quadrature, steps).alphas, weights(quadrature, steps)
    assert (w != 0).sum() == steps
    for degree in range(EXACT_DEGREE[quadrature](steps) + 1):
        torch.testing.assert_close((w * alphas**degree).sum().item(), 1 / (degree + 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_paper_is_end_difference_times_mean_gradient(quadrature):
    """Eq. (1): every row is its weight times (e_n - e_1), so that Q h = w (h(1) - h(0))."""
    rule = path_rule("paper", quadrature, 6)
    ends = torch.zeros(len(rule.alphas), dtype=torch.float64)
    ends[-1], ends[0] = 1, -1
    assert rule.alphas[0] == 0 and rule.alphas[-1] == 1
    torch.testing.assert_close(rule.q, weights(quadrature, 6)[:, None] * ends)
    torch.testing.assert_close(rule.q.sum(0), ends, rtol=0, atol=1e-14)


@pytest.mark.parametrize("estimator", ["conductance", "direct"])
@pytest.mark.parametrize("quadrature", CAPTUM)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_differences_are_captums(quadrature, steps, estimator):
    """captum takes steps + 1 nodes and multiplies the gradient at each by the change of h to the next."""
    rule = path_rule(estimator, quadrature, steps)
    nodes = torch.tensor(approximation_parameters(CAPTUM[quadrature])[1](steps + 1), dtype=torch.float64)
    torch.testing.assert_close(rule.alphas, nodes, rtol=0, atol=1e-7)  # captum's midpoints are fp32
    h = torch.randn(steps + 1, dtype=torch.float64)
    torch.testing.assert_close((rule.q @ h)[:-1], h.diff())
    assert not rule.q[-1].any()


@pytest.mark.parametrize("steps", [2, 3, 10])
@pytest.mark.parametrize("quadrature", ["trapezoid", "lobatto"])
def test_differences_of_linear_h_are_the_weights(quadrature, steps):
    """Where h moves linearly, conductance and Eq. (1) are one number: Q (a + b alpha) = w b."""
    rule = path_rule("conductance", quadrature, steps)
    torch.testing.assert_close(rule.q @ (3 - 2 * rule.alphas), -2 * weights(quadrature, steps), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("steps", [2, 5, 17, 60])
def test_lobatto_differentiates_polynomials(steps):
    """Spectral accuracy rests on this: n nodes give the exact derivative of every polynomial below degree n."""
    rule = path_rule("conductance", "lobatto", steps)
    for degree in range(min(steps, 12)):
        derivative = degree * rule.alphas ** max(degree - 1, 0)
        torch.testing.assert_close(rule.q @ rule.alphas**degree, weights("lobatto", steps) * derivative, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [2, 9])
@pytest.mark.parametrize("quadrature", QUADRATURES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_layers_that_stand_still_score_nothing(estimator, quadrature, steps):
    """A constant h has no change to attribute: Q 1 = 0 in every row."""
    q = path_rule(estimator, quadrature, steps).q
    torch.testing.assert_close(q.sum(1), torch.zeros(len(q), dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [1, 3, 4, 100])
@pytest.mark.parametrize("steps", [2, 11])
@pytest.mark.parametrize("quadrature", QUADRATURES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_chunks_add_up(estimator, quadrature, steps, size):
    """Splitting the path changes memory, never the attribution; only lobatto, which couples all points, stays whole."""
    frequency = torch.randn(2, 3, dtype=torch.float64)

    def attribution(rule):
        phase = rule.alphas[:, None, None] * frequency
        return conductance_reduce(phase.sin(), phase.exp(), rule.q)

    rule = path_rule(estimator, quadrature, steps)
    parts = rule.chunks(size)
    torch.testing.assert_close(sum(map(attribution, parts)), attribution(rule), rtol=1e-12, atol=1e-13)
    if quadrature != "lobatto" or estimator == "paper":
        assert max(len(part.alphas) for part in parts) <= max(size, 3)
    else:
        assert parts == [rule]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("captum", "midpoint", 5), "estimator='captum' is not one of paper, conductance, direct"),
        (("paper", "simpson", 5), "quadrature='simpson' is not one of midpoint, gausslegendre, trapezoid, lobatto"),
        (("paper", "midpoint", 0), "steps=0: midpoint needs an integer of at least 1"),
        (("paper", "trapezoid", 1), "steps=1: trapezoid needs an integer of at least 2"),
        (("direct", "lobatto", 1), "steps=1: lobatto needs an integer of at least 2"),
        (("paper", "midpoint", 2.5), "steps=2.5: midpoint needs an integer of at least 1"),
    ],
)
def test_errors_name_the_choices(arguments, message):
    with pytest.raises(ValueError, match=message):
        path_rule(*arguments)
