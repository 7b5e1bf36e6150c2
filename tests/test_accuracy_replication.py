"""Gains on validation: of the same runs, paired by seed, over the same tasks as on test."""

import numpy as np
import pytest
from accuracy_rows import row
from scipy.stats import ttest_rel

from bench.accuracy import tables
from bench.accuracy.replication import replications
from bench.accuracy.statistics import summarise

FEW, SEEDS = 200, range(4)


def runs_of(*tasks: str, method: str = "cobra", level: float = 0.8) -> list[dict]:
    return [
        row(name, task, seed=seed, level=at)
        for name, at in (("lora", 0.8), (method, level))
        for task in tasks
        for seed in SEEDS
    ]


def values(rows: list[dict], metric: str) -> list[np.ndarray]:
    return [np.array([r["validation"][metric] for r in rows if r["method"] == method]) for method in ("cobra", "lora")]


def test_of_one_task_it_is_the_paired_t_test():
    rows = runs_of("hyper", level=0.9)
    (found,) = replications(summarise(rows, FEW))
    ours, theirs = values(rows, "accuracy")
    assert found.validation.mean == pytest.approx((ours - theirs).mean())
    assert found.validation.p == pytest.approx(ttest_rel(ours, theirs).pvalue)


def test_losses_gain_by_falling():
    rows = runs_of("foods", level=0.7)
    (found,) = replications(summarise(rows, FEW))
    ours, theirs = values(rows, "mse")
    assert found.validation.mean == pytest.approx(1 - ours.mean() / theirs.mean()) and found.validation.mean > 0


def test_validation_counts_and_not_test():
    rows = runs_of("hyper")
    for each in rows:
        each["validation"] = {"accuracy": 0.6 + 0.01 * each["seed"] - (0.1 if each["method"] == "cobra" else 0.0)}
    (found,) = replications(summarise(rows, FEW))
    assert found.validation.mean == pytest.approx(-0.1) and found.test.mean > -0.05


def test_training_losses_stand_beside_loras():
    """Mean of the ratios of pairs; without AdaLoRA's, which hold a penalty."""
    rows = runs_of("hyper") + runs_of("hyper", method="adalora")[len(SEEDS) :]
    for each in rows:
        each["train_loss"] = 0.5 if each["method"] == "lora" else (0.4, 0.6, 0.6, 0.8)[each["seed"]]
    found = {replication.method: replication for replication in replications(summarise(rows, FEW))}
    assert found["cobra"].training == pytest.approx(0.2) and (found["cobra"].higher, found["cobra"].pairs) == (3, 4)
    assert found["adalora"].training is None
    shown = tables.replication(rows, summarise(rows, FEW)).splitlines()
    assert any("| cobra |" in line and line.endswith("| +20% (3 of 4) |") for line in shown)
    assert any("| adalora |" in line and line.endswith("| – |") for line in shown)


def test_the_mean_is_over_the_tasks_of_the_test():
    """A method that lacks a task has no mean on test, and so none here."""
    rows = runs_of("hyper", "topics") + runs_of("hyper", method="plan")[len(SEEDS) :]
    (found,) = replications(summarise(rows, FEW))
    assert found.method == "cobra" and found.kind == "classification"
    assert "| minilm, rank 2 | classification | cobra |" in tables.replication(rows, summarise(rows, FEW))
