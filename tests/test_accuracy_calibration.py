"""Calibration beside LoRA's: paired over seeds, over tasks that both have, corrected within a method."""

import numpy as np
import pytest
from accuracy_rows import row
from scipy.stats import ttest_rel

from bench.accuracy import tables
from bench.accuracy.calibration import METRICS, calibration_changes
from bench.accuracy.metrics import SCALED
from bench.accuracy.statistics import summarise

TASKS, SEEDS, FEW = ("hyper", "topics"), 5, 200


def rows_of(change: float, spread: float, tasks=TASKS, method="cobra") -> list[dict]:
    """LoRA and a method whose ECE differs by `change`, more or less, on every task and seed."""
    drawn = np.random.default_rng(0)
    made = []
    for task in tasks:
        for seed in range(SEEDS):
            lora, ours = row("lora", task, seed=seed), row(method, task, seed=seed)
            lora["test"]["ece"] = 0.05 + 0.01 * drawn.standard_normal()
            ours["test"]["ece"] = lora["test"]["ece"] + change + spread * drawn.standard_normal()
            made += [lora, ours]
    return made


def ece(rows: list[dict]):
    return next(found for found in calibration_changes(summarise(rows, FEW)) if found.metric == "ece")


def test_of_one_task_it_is_the_paired_t_test():
    rows = rows_of(-0.01, 0.004, TASKS[:1])
    found = ece(rows)
    ours, theirs = ([r["test"]["ece"] for r in rows if r["method"] == m] for m in ("cobra", "lora"))
    assert found.change.mean == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert found.change.p == pytest.approx(ttest_rel(ours, theirs).pvalue)


def test_pairing_and_tasks_narrow_the_interval():
    one, two = ece(rows_of(-0.01, 0.004, TASKS[:1])), ece(rows_of(-0.01, 0.004))
    assert two.tasks == 2 and two.change.half < one.change.half < 0.01
    assert two.change.high < 0 and two.change.p < two.corrected <= 3 * two.change.p


def test_no_difference_is_none():
    assert ece(rows_of(0.0, 0.004)).corrected > 0.05


def test_a_task_without_the_method_leaves_no_mean():
    assert calibration_changes(summarise([*rows_of(-0.01, 0.004), row("lora", "topics", 8), row("cobra", "topics", 8)], FEW))
    rows = [r for r in rows_of(-0.01, 0.004) if (r["method"], r["task"]) != ("cobra", "topics")]
    assert calibration_changes(summarise(rows, FEW)) == []


def test_places_are_told_apart_and_shown():
    rows = rows_of(-0.01, 0.004) + [row(m, t, seed=s, steps=50) for m in ("lora", "cobra") for t in TASKS for s in range(3)]
    rows += [row("cobra", "foods", seed=0), row("lora", "foods", seed=0)]
    table = tables.calibration_gains(rows, summarise(rows, FEW))
    assert len(table.splitlines()) == 2 + 2 * len(METRICS)
    assert (
        "| minilm, rank 2, steps 50 | cobra | 2 | 3 | ECE | +0.0000 |" in table
        and "| minilm, rank 2 | cobra | 2 | 5 | ECE | -0.0" in table
    )


def test_scaled_metrics_are_of_the_runs_that_have_them():
    """Pairs of seeds of which both have them; a family of their own for Holm's correction."""
    rows = rows_of(-0.01, 0.004, TASKS[:1])
    for r in rows:
        r["test"] = {name: value for name, value in r["test"].items() if name not in SCALED}
    assert calibration_changes(summarise(rows, FEW), SCALED) == []
    for r in rows[:6] + rows[-1:]:  # three pairs and half of one
        r["test"] |= {name: r["test"][name.removeprefix("scaled_")] / 2 for name in SCALED}
    found = {change.metric: change for change in calibration_changes(summarise(rows, FEW), SCALED)}
    assert found.keys() == SCALED.keys() and found["scaled_ece"].change.seeds == 3
    halved = [(ours["test"]["ece"] - lora["test"]["ece"]) / 2 for lora, ours in zip(rows[0:6:2], rows[1:6:2], strict=True)]
    assert found["scaled_ece"].change.mean == pytest.approx(np.mean(halved))
    assert "| cobra | 1 | 3 | ECE | " in tables.calibration_gains(rows, summarise(rows, FEW), SCALED)
