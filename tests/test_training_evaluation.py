"""Metrics of held-out rows against torchmetrics and numpy, whatever the batches are."""

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error
from transformers.modeling_outputs import SequenceClassifierOutput

from cobra.cli.training.evaluation import BINS, evaluate
from cobra.cli.training.tokens import MASKED
from cobra.report.measures import calibration_error


class Given(nn.Module):
    """Its outputs are its inputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, logits):
        return SequenceClassifierOutput(logits=logits * self.weight)


def batched(logits, labels, size):
    return [{"logits": x, "labels": y} for x, y in zip(logits.split(size), labels.split(size), strict=True)]


@pytest.mark.parametrize("size", [7, 100])
def test_classification(size):
    logits, labels = 2 * torch.randn(100, 4), torch.randint(4, (100,))
    model = Given().train()
    found = evaluate(model, batched(logits, labels, size), "classification", "test")
    assert [*found.metrics] == ["accuracy", "nll", "ece", "examples"] and not model.training
    assert found.metrics["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert found.metrics["nll"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    expected = multiclass_calibration_error(logits.softmax(1), labels, num_classes=4, n_bins=BINS).item()
    assert found.metrics["ece"] == pytest.approx(expected, abs=1e-6) == calibration_error(found.bins)
    assert sum(one.count for one in found.bins) == found.metrics["examples"] == 100


def test_regression():
    outputs, labels = torch.randn(50, 1), torch.randn(50)
    found = evaluate(Given(), batched(outputs, labels, 8), "regression", "test")
    x, y = outputs[:, 0].numpy(), labels.numpy()
    assert found.metrics["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks = [values.argsort().argsort() for values in (x, y)]
    assert found.metrics["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found.metrics["mse"] == pytest.approx(((x - y) ** 2).mean(), rel=1e-5)
    assert found.metrics["mae"] == pytest.approx(abs(x - y).mean(), rel=1e-5) and found.bins == []


def test_language_models():
    """Every label is predicted from the token before it; masked ones count nowhere, and long texts count by their tokens."""
    logits, labels = torch.randn(6, 9, 5), torch.randint(5, (6, 9))
    labels[0, 4:] = MASKED
    labels[1, :3] = MASKED
    found = evaluate(Given(), batched(logits, labels, 4), "causal-lm", "test")
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=MASKED).item()
    assert found.metrics["tokens"] == 6 * 8 - 5 - 2
    assert found.metrics["nll"] == pytest.approx(expected, rel=1e-6)
    assert found.metrics["perplexity"] == pytest.approx(np.exp(expected), rel=1e-6)


def test_metrics_that_are_not_defined_are_left_out():
    """A constant has no correlation, a diverged model no loss: files stay JSON."""
    found = evaluate(Given(), batched(torch.ones(4, 1), torch.randn(4), 2), "regression", "test")
    assert "pearson" not in found.metrics and "mse" in found.metrics
    logits = torch.full((3, 2), float("nan"))
    found = evaluate(Given(), batched(logits, torch.tensor([0, 1, 1]), 2), "classification", "test")
    assert "nll" not in found.metrics and found.metrics["examples"] == 3 and found.bins == []
