"""pi and its logits against numbers worked out by hand and those of the paper."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cobra.prior import fuse, prior_logits

PHI, GAMMA = torch.tensor([1.0, 3.0, 4.0]), torch.tensor([2.0, 2.0, 1.0])  # shares (1, 3, 4)/8 and (2, 2, 1)/5


@pytest.mark.parametrize(
    ("fusion", "expected"),
    [
        ("product", [2 / 12, 6 / 12, 4 / 12]),
        ("sum", [(1 / 8 + 2 / 5) / 2, (3 / 8 + 2 / 5) / 2, (4 / 8 + 1 / 5) / 2]),
        ("contribution", [1 / 8, 3 / 8, 4 / 8]),
        ("gradient", [2 / 5, 2 / 5, 1 / 5]),
    ],
)
def test_fusions_by_hand(fusion, expected):
    torch.testing.assert_close(fuse(PHI, GAMMA, fusion), torch.tensor(expected, dtype=torch.float64))


POSITIVE = st.floats(2.0**-100, 2.0**100, width=32)


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=40), st.sampled_from(["product", "sum"]), POSITIVE)
def test_pi_is_a_distribution_of_shares(factors, fusion, unit):
    """pi sums to 1, and neither factor's unit matters, over the whole range of fp32."""
    phi, gamma = torch.tensor(factors).double().unbind(1)
    pi = fuse(phi, gamma, fusion)
    assert pi.sum().item() == pytest.approx(1) and (pi >= 0).all()
    torch.testing.assert_close(fuse(phi * unit, gamma, fusion), pi, rtol=1e-9, atol=0)
    torch.testing.assert_close(fuse(phi, gamma * unit, fusion), pi, rtol=1e-9, atol=0)


def test_a_zero_factor_vetoes_its_group_in_the_product_only():
    phi, gamma = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([8.0, 1.0, 1.0])
    torch.testing.assert_close(fuse(phi, gamma).tolist(), [0.0, 0.5, 0.5])
    assert fuse(phi, gamma, "sum")[0] > 1 / 3


@pytest.mark.parametrize(
    ("phi", "gamma", "fusion"),
    [
        ([0.0, 0.0], [1.0, 1.0], "product"),
        ([1.0, 0.0], [0.0, 1.0], "product"),
        ([0.0, 0.0], [1.0, 1.0], "contribution"),
        ([1.0, 1.0], [0.0, 0.0], "gradient"),
        ([0.0, 0.0], [0.0, 0.0], "sum"),
    ],
)
def test_no_weight_anywhere_is_an_error(phi, gamma, fusion):
    """A prior of NaNs would only show up much later, as a loss."""
    with pytest.raises(ValueError, match=f"fusion='{fusion}' leaves no group with weight"):
        fuse(torch.tensor(phi), torch.tensor(gamma), fusion)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("factor", ["conductance", "gradient"])
@pytest.mark.parametrize("fusion", ["product", "contribution", "gradient"])
def test_bad_factors_are_named(fusion, factor, bad):
    """Also where the fusion would not look at that factor: it was measured wrong all the same."""
    factors = {"conductance": PHI, "gradient": GAMMA} | {factor: torch.tensor([1.0, bad, 1.0])}
    with pytest.raises(ValueError, match=f"{factor} must be finite and non-negative"):
        fuse(**factors, fusion=fusion)


def test_unknown_fusion_lists_the_known():
    with pytest.raises(ValueError, match="fusion='mean' is not one of product, sum, contribution, gradient"):
        fuse(PHI, GAMMA, "mean")


@pytest.mark.parametrize(
    ("layers", "gamma", "share", "rho"),
    [
        (24, 5, 0, 0.448),
        (24, 5, 1 / 24, 0.5),
        (24, 5, 3 / 24, 0.603),
        (24, 5, 0.2, 0.688),
        (12, 5, 0, 0.397),
        (12, 5, 1 / 12, 0.5),
        (12, 5, 3 / 12, 0.697),
        (12, 5, 0.2, 0.642),
        (32, 5, 0, 0.461),
        (32, 5, 1 / 32, 0.5),
        (32, 5, 3 / 32, 0.577),
        (32, 5, 0.2, 0.699),
        (24, 50, 0, 0.111),
        (24, 50, 3 / 24, 0.985),
        (24, 50, 0.2, 1.0),
    ],
)
def test_literal_prior_is_nearly_flat(layers, gamma, share, rho):
    """rho = sigmoid(gamma (pi - mean pi)) of one layer with a given share of pi, the rest spread over the others."""
    pi = torch.full((layers,), (1 - share) / (layers - 1), dtype=torch.float64)
    pi[0] = share
    assert torch.sigmoid(prior_logits(pi, gamma))[0].item() == pytest.approx(rho, abs=5e-4)


def test_standardized_logits_have_spread_gamma():
    """However flat pi is: mean 0, standard deviation gamma, order and ratios of the differences kept."""
    pi = fuse(PHI, GAMMA)
    for scores in (pi, 1 / 3 + 1e-4 * (pi - 1 / 3)):
        logits = prior_logits(scores, 5.0, "standardized")
        torch.testing.assert_close(logits.mean().item(), 0.0, rtol=0, atol=1e-9)
        torch.testing.assert_close(logits.std(correction=0).item(), 5.0)
        torch.testing.assert_close(logits, prior_logits(pi, 5.0, "standardized"), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", ["literal", "standardized"])
@pytest.mark.parametrize("groups", [1, 3, 7, 24, 71])
def test_equal_groups_have_a_flat_prior(groups, scale):
    """Rounding makes 1/7 differ from the mean of seven of them; a spread of that size is none."""
    pi = fuse(torch.ones(groups), torch.ones(groups))
    assert prior_logits(pi, 5.0, scale).abs().max() < 1e-12


def test_gamma_zero_is_no_prior():
    assert not prior_logits(fuse(PHI, GAMMA), 0.0).any()


def test_log_prior_has_odds_in_proportion():
    """gamma 1 on log pi: where pi doubles, the prior's odds double; a group without weight counts as the least one."""
    logits = prior_logits(torch.tensor([0.1, 0.2, 0.4, 0.0]), 1.0, "log")
    odds = logits.exp()
    torch.testing.assert_close(odds / odds[0], torch.tensor([1.0, 2.0, 4.0, 1.0], dtype=torch.float64))
    assert logits.mean().item() == pytest.approx(0)
