"""Rows grouped into cells, and the checks on the way."""

import numpy as np
import pytest
from accuracy_rows import row

from bench.accuracy.cells import Cell, differing, group, matrix, of_phase, sort_methods, stream
from bench.accuracy.recipe import TEXTS


def test_cells_and_methods_in_order():
    rows = [row(method, task, rank, seed) for seed in (1, 0) for task in ("topics", "hyper") for rank in (8, 2)
            for method in ("cobra", "lora", "adalora")]  # fmt: skip
    found = group(rows)
    assert list(found) == [Cell("minilm", task, rank) for task in ("hyper", "topics") for rank in (2, 8)]
    assert [list(methods) for methods in found.values()] == [["lora", "adalora", "cobra"]] * 4
    assert list(found[Cell("minilm", "hyper", 2)]["lora"]) == [0, 1]


def test_unknown_methods_come_last():
    assert sort_methods(["zeta", "cobra", "alpha", "lora", "lora"]) == ["lora", "cobra", "alpha", "zeta"]


def test_unusual_conditions_have_cells_of_their_own():
    rows = [row(), row(noise=0.2, steps=50), row(task="gcide", **TEXTS), row(task="gcide", **{**TEXTS, "steps": 90})]
    found = [(cell.task, str(cell.place)) for cell in group(rows)]
    assert found == [
        ("hyper", "minilm, rank 2"), ("hyper", "minilm, rank 2, noise 0.2, steps 50"),
        ("gcide", "smollm2, rank 2"), ("gcide", "smollm2, rank 2, steps 90"),
    ]  # fmt: skip


def test_two_rows_of_one_run_are_named():
    with pytest.raises(
        ValueError, match=r"lora on hyper, minilm, rank 2, seed 0 has two final rows, .* differ in beta, lr; keep one"
    ):
        group([row(), row(lr=0.01, settings=(("beta", 1.0),))])


def test_differing_looks_into_settings():
    one, other = {"lr": 1, "settings": {"beta": 1, "gamma": 2}}, {"lr": 1, "settings": {"beta": 2}}
    assert differing(one, other) == {"beta", "gamma"}


def test_phases_and_diverged_rows():
    rows = [row(), row(phase="search"), row(seed=1, diverged=True)]
    assert of_phase(rows, "final") == rows[:1]
    diverged = of_phase(rows, "final", diverged=True)
    assert [(r["task"], r["method"], r["average_rank"], r["seed"]) for r in diverged] == [("hyper", "lora", 2, 1)]


def test_matrix_holds_seeds_in_order():
    rows = [row(seed=seed, level=level) for seed, level in ((0, 0.5), (1, 0.9))]
    runs = group(rows)[Cell("minilm", "hyper", 2)]["lora"]
    assert matrix(runs).mean(1) == pytest.approx([0.5, 0.9])
    assert np.array_equal(matrix(runs, [1]), matrix(runs)[1:])


def test_results_must_average_to_the_metric():
    changed = row()
    changed["test"]["accuracy"] += 0.01
    with pytest.raises(ValueError, match=r"average to 0\.8, its accuracy is 0\.81"):
        matrix({0: changed})


def test_splits_of_different_sizes():
    with pytest.raises(ValueError, match="different sizes"):
        matrix({0: row(), 1: row(seed=1, size=100)})


def test_rows_without_examples():
    changed = row()
    del changed["test"]["per_example"]
    with pytest.raises(ValueError, match="no results of test examples"):
        matrix({0: changed})


def test_tasks_have_streams_of_their_own():
    assert stream(Cell("minilm", "hyper", 2)) == stream(Cell("minilm", "hyper", 8)) != stream(Cell("minilm", "topics", 2))
