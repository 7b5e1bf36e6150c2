"""Metrics against numbers worked out by hand, and the packed results of test examples."""

import math

import numpy as np
import pytest
import torch

from bench.accuracy.metrics import (
    classification_metrics,
    fit_temperature,
    language_metrics,
    pack_per_example,
    regression_metrics,
    unpack_per_example,
)


def logits_of(probabilities):
    return torch.tensor(probabilities).log()


def test_classification_by_hand():
    """Three of four right: 1 of class 0 is taken for class 1."""
    logits = logits_of([[0.9, 0.1], [0.2, 0.8], [0.35, 0.65], [0.1, 0.9]])
    found = classification_metrics(logits, torch.tensor([0, 1, 0, 1]))
    assert found["accuracy"] == pytest.approx(3 / 4)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)  # class 0: precision 1, recall 1/2; class 1: 2/3, 1
    assert found["mcc"] == pytest.approx((1 * 2 - 1 * 0) / math.sqrt(1 * 3 * 2 * 2))
    assert found["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.8) + math.log(0.35) + math.log(0.9)) / 4, rel=1e-5)
    assert found["brier"] == pytest.approx(2 * (0.1**2 + 0.2**2 + 0.65**2 + 0.1**2) / 4, rel=1e-5)
    # bins of width 1/15: 0.65 (wrong), 0.8 (right) and both of 0.9 (right)
    assert found["ece"] == pytest.approx((0.65 + 0.2 + 2 * 0.1) / 4, rel=1e-5)


def test_confidences_of_one_bin_are_averaged():
    """0.61 and 0.65 share the tenth of 15 bins; one is right: |1/2 − 0.63|."""
    found = classification_metrics(logits_of([[0.61, 0.39], [0.65, 0.35]]), torch.tensor([0, 1]))
    assert found["ece"] == pytest.approx(0.13, rel=1e-4)


def test_logits_between_0_and_1_are_not_probabilities():
    """A calibration error of logits that pass for probabilities is another number."""
    found = classification_metrics(torch.tensor([[0.5, 0.2, 0.3]]), torch.tensor([0]))
    weights = [math.exp(v) for v in (0.5, 0.2, 0.3)]
    assert found["ece"] == pytest.approx(1 - weights[0] / sum(weights))


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_temperature_undoes_a_factor(factor):
    """Labels drawn from the probabilities of logits that were multiplied since; and no other temperature has a lower NLL."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(20_000, 3, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1)[:, 0]
    found = fit_temperature(factor * logits, labels)
    assert found == pytest.approx(factor, rel=0.03)
    nll = [classification_metrics(factor * logits / t, labels)["nll"] for t in (0.98 * found, found, 1.02 * found)]
    assert nll[1] == min(nll)


@pytest.mark.parametrize(("right", "bound"), [(True, 0.05), (False, 20.0)])
def test_temperature_stays_within_its_bounds(right, bound):
    """Where all labels are right the best one is 0, where all are wrong it is infinite."""
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, torch.tensor([0, 1] if right else [1, 0])) == pytest.approx(bound, rel=1e-3)


def test_regression_by_hand():
    found = regression_metrics(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 2.0]))
    assert found["mse"] == pytest.approx(5 / 3)
    assert found["mae"] == pytest.approx(1.0)
    # deviations −4/3, −1/3, 5/3 and −1, 1, 0
    assert found["pearson"] == pytest.approx((4 / 3 - 1 / 3) / math.sqrt((16 + 1 + 25) / 9 * 2))
    assert found["spearman"] == pytest.approx(1 - 6 * (0 + 1 + 1) / (3 * 8), rel=1e-4)


def test_language_by_hand():
    """Two texts of 1 and 3 tokens: 2 nats, and 0.5 each."""
    found = language_metrics(torch.tensor([2.0, 1.5]), torch.tensor([1, 3]))
    assert found["nll"] == pytest.approx((2 + 0.5) / 2)
    assert found["token_nll"] == pytest.approx(3.5 / 4)
    assert found["perplexity"] == pytest.approx(math.exp(3.5 / 4))


@pytest.mark.parametrize(
    ("losses", "tokens", "message"),
    [
        (torch.ones(2, 1), torch.ones(2), r"shape \(2, 1\)"),
        (torch.ones(2), torch.ones(3), r"need \(2,\)"),
        (torch.tensor([1.0, math.nan]), torch.ones(2), "NaN"),
        (torch.tensor([1.0, 0.0]), torch.tensor([3, 0]), "text 1 has no token that counts"),
    ],
)
def test_language_refuses(losses, tokens, message):
    with pytest.raises(ValueError, match=message):
        language_metrics(losses, tokens)


def test_constant_predictions_have_no_correlation():
    found = regression_metrics(torch.full((4,), 0.3), torch.arange(4.0))
    assert found["pearson"] == found["spearman"] == 0.0
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("count", [1, 7, 8, 1500])
def test_correctness_comes_back(count):
    values = np.random.default_rng(count).random(count) < 0.8
    packed = pack_per_example(values)
    assert packed.startswith(f"bits:{count}:") and len(packed) < 40 + count / 4
    assert np.array_equal(unpack_per_example(packed), values)


def test_squared_errors_come_back_from_tensors():
    values = torch.rand(33, dtype=torch.float64)
    found = unpack_per_example(pack_per_example(values))
    assert found.dtype == np.float32
    assert np.array_equal(found, values.float().numpy())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 2), bool), r"shape \(2, 2\)"),
        (np.zeros(0, bool), r"shape \(0,\)"),
        (np.array([1.0, np.nan]), "example 1"),
        (np.array([-1.0, 0.0]), "example 0"),
        (np.array([0.0, 1e300]), "example 1"),
        (np.array([1, 0]), "int64"),
    ],
)
def test_what_is_not_packed(values, message):
    with pytest.raises(ValueError, match=message):
        pack_per_example(values)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        ("AAAA", "starts with"),
        ("bits:x:AAAA", "starts with"),
        ("bits:9:AA==", "1 bytes; 9 examples need 2"),
        ("float32:1:AA==", "1 bytes; 1 examples need 4"),
        ("bits:8:A*==", "not base64"),
        ("float32:1:AADAfw==", "not finite"),
    ],
)
def test_what_is_not_unpacked(packed, message):
    with pytest.raises(ValueError, match=message):
        unpack_per_example(packed)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), "shape"),
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), "2 classes or more"),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.long), r"need \(3,\)"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), r"need \(0,\)"),
        (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), "NaN"),
        (torch.zeros(1, 2), torch.tensor([2]), "0..1"),
        (torch.zeros(1, 2), torch.tensor([0.5]), "integers"),
    ],
)
def test_classification_refuses(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(logits, labels)


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        (torch.zeros(3, 1), torch.zeros(3), r"shape \(3, 1\)"),
        (torch.zeros(3), torch.zeros(4), r"need \(3,\)"),
        (torch.zeros(2), torch.tensor([0.0, math.inf]), "infinity"),
    ],
)
def test_regression_refuses(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        regression_metrics(predictions, labels)
