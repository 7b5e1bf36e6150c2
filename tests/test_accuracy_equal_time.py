"""COBRA beside longer trainings of LoRA: which rows are compared, and what is said of them."""

import pytest
from accuracy_rows import row

from bench.accuracy import equal_time
from bench.accuracy.cells import cell_of
from bench.accuracy.searches import SAME_TIME
from bench.accuracy.statistics import summarise

SEEDS = range(3)
LONGER = SAME_TIME["cobra"]


def study() -> list[dict]:
    """LoRA's usual steps and more, COBRA with one seed more, on one task; on another no longer LoRA."""
    longer = [row("lora", "foods", seed=s, level=0.6, **LONGER) for s in SEEDS]
    usual = [row("lora", task, seed=s, level=0.9) for task in ("foods", "hyper") for s in SEEDS]
    ours = [row("cobra", task, seed=s, level=0.66) for task in ("foods", "hyper") for s in range(4)]
    return [*longer, *usual, *ours, row("cobra", "foods", seed=0, level=0.1, **LONGER)]


def test_only_pairs_of_longer_loras_and_usual_cobras():
    rows = study()
    found = equal_time.rows_of(rows, "cobra")
    assert [(r["method"], r["seed"]) for r in found] == [(m, s) for m in ("lora", "cobra") for s in SEEDS]
    assert {cell_of(r).condition for r in found} == {""} and rows[0]["config"]["steps"] == LONGER["steps"]
    losses = {m: sum(r["test"]["mse"] for r in found if r["method"] == m) for m in ("lora", "cobra")}
    (gain,) = (c.gain for c in summarise(found).comparisons)
    assert gain.mean == pytest.approx(1 - losses["cobra"] / losses["lora"]) and gain.mean < 0


def test_every_form_has_its_own_steps_beside_it():
    quick = SAME_TIME["cobra+quick"]
    shorter = [row("lora", "foods", seed=s, level=0.8, **quick) for s in SEEDS]
    rows = [*study(), *shorter, *(row("cobra+quick", "foods", seed=s, level=0.7) for s in SEEDS)]
    assert {r["key"] for r in equal_time.rows_of(rows, "cobra+quick") if r["method"] == "lora"} == {r["key"] for r in shorter}
    lines = equal_time.table(rows, summarise([])).splitlines()[2:]
    assert [line.split(" | ")[3] for line in lines] == [str(LONGER["steps"])] * 2 + [str(quick["steps"])] * 2


def test_a_line_a_task_and_a_mean():
    lines = equal_time.table(study(), summarise([])).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| cobra | foods | minilm, rank 2 | 332 | 0.")
    assert lines[3].startswith("| cobra | mean of 1 | minilm, rank 2 | 332 | – | – | -")
