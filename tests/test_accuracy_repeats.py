"""Recipes that were run in two phases: what is a pair, and how far apart it is."""

import pytest
from accuracy_rows import row

from bench.accuracy.repeats import Repeat, repeats, table
from bench.accuracy.statistics import summarise


def test_pairs_are_of_one_recipe():
    """But for the phase; accuracies differ, losses relatively; other rates, seeds and diverged runs are no repeats."""
    first, again, loss, later = row(phase="search"), row(phase="ablation"), row(task="foods"), row(task="foods", phase="factor")
    again["validation"] = {**again["validation"], "accuracy": first["validation"]["accuracy"] - 0.01}
    later["validation"] = {**later["validation"], "mse": 1.02 * loss["validation"]["mse"]}
    later["machine"] = "another"
    others = [row(phase="ablation", lr=0.1), row(phase="ablation", seed=1), row(phase="factor", diverged=True)]
    found = list(repeats([first, again, loss, later, *others]))
    assert [(r.kind, r.same_machine) for r in found] == [("classification", True), ("regression", False)]
    assert [r.change for r in found] == pytest.approx([-0.01, 0.02])


def test_the_table_has_spread_and_largest():
    rows = [row(phase=phase, seed=s) for phase in ("search", "ablation") for s in range(4)]
    rows[4]["validation"] = {**rows[4]["validation"], "accuracy": rows[4]["validation"]["accuracy"] + 0.02}
    assert table(rows, summarise([])).splitlines()[2:] == ["| classification | one | 4 | 3 | 1.00 | 2.00 |"]
    assert Repeat("regression", True, 0.0) in list(repeats([row(task="foods"), row(task="foods", phase="search")]))
