"""Tables of drawn rows, complete, with holes, and of none."""

import pytest
from accuracy_rows import row

from bench.accuracy import tables
from bench.accuracy.evidence import TABLES
from bench.accuracy.formats import EMPTY, markdown, number, p_value, percent
from bench.accuracy.intervals import seeds_estimate
from bench.accuracy.searches import SAME_TIME
from bench.accuracy.statistics import Choice, summarise

FEW = 200
ALL = {name: table for name, table in TABLES.items() if name not in ("diagnosis", "starts")}  # which have rows of their own


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """LoRA and COBRA, one cell of COBRA missing, two seeds of DoRA on one task, one run diverged."""
    made = [
        row(method, task, rank, seed, level=level, seconds=seconds)
        for method, level, seconds in (("lora", 0.7, 10.0), ("cobra", 0.8, 14.0)) for task in ("hyper", "topics", "foods")
        for rank in (2, 8) for seed in range(3) if (method, task, rank) != ("cobra", "topics", 8)
    ]  # fmt: skip
    made += [row("dora", seed=seed, parameters=1250) for seed in range(2)]
    return [*made, row("cobra", seed=3, diverged=True), row("adalora", "topics", diverged=True)]


@pytest.fixture(scope="module")
def summary(rows):
    return summarise(rows, FEW)


def cells(table: str, start: str) -> list[str]:
    """Of the first line that starts so."""
    line = next(line for line in table.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("table", ALL.values(), ids=ALL)
def test_no_rows(table):
    assert table([], summarise([])) == EMPTY


@pytest.mark.parametrize("table", ALL.values(), ids=ALL)
def test_markdown_is_rectangular(table, rows, summary):
    """With every phase there: each line of a table has as many cells as its header."""
    studies = [(phase, s, lr) for phase in ("factor", "ablation") for s in range(2) for lr in (0.003, 0.01)]
    more = [row("cobra", phase=phase, seed=s, lr=lr) for phase, s, lr in studies]
    more += [row("cobra", phase="ablation", seed=s, settings=(("row_scale", 3.0),)) for s in range(2)]
    more += [row("lora", phase="search", seed=100, lr=lr) for lr in (0.003, 0.01)]
    more += [row("lora", "foods", seed=s, **SAME_TIME["cobra"]) for s in range(2)]
    text = table([*rows, *more], summary)
    widths = {tuple(line.count("|") for line in block.splitlines()) for block in text.split("\n\n") if block.startswith("|")}
    assert widths and all(len(set(width)) == 1 for width in widths)
    assert "nan" not in text


def test_main(rows, summary):
    low, high = tables.main(rows, summary).split("**minilm, rank 8**")
    header = cells(low, "method")
    assert header == ["method", "hyper (accuracy %, ↑)", "topics (accuracy %, ↑)", "foods (MSE, ↓)", "mean accuracy"]
    hyper, topics, foods, mean = cells(low, "cobra")[1:]
    assert hyper.startswith("80.0 ± ") and hyper.endswith(" (3, 1 diverged)")
    assert topics.endswith(" (3)") and foods.startswith("0.2") and mean.startswith("80.0 ± ")
    assert cells(low, "dora")[1].endswith("(2†)")
    assert cells(low, "dora")[2:] == ["–", "–", "–"]
    assert cells(low, "adalora")[1:] == ["–", "1 diverged", "–", "–"]
    assert cells(high, "cobra")[2] == cells(high, "cobra")[4] == "–"


def test_half_of_the_interval_is_shown(summary, rows):
    cell = next(cell for cell in summary.runs if cell[1:3] == ("hyper", 2))
    found = summary.levels[cell, "lora"]
    assert cells(tables.main(rows, summary), "lora")[1] == f"70.0 ± {50 * (found.high - found.low):.1f} (3)"


def test_means_and_wins(rows, summary):
    text = tables.means(rows, summary)
    lines = [line for line in text.splitlines() if "| cobra |" in line]
    assert len(lines) == 3  # classification at rank 2, regression at both
    assert "2 × classification" in lines[0] and "| cobra | 3 | 80.0 ± " in lines[0] and "| +10.00 |" in lines[0]
    assert " % |" in lines[1]
    assert cells(tables.wins(rows, summary), "cobra")[1].startswith("2 / ")


def test_pairs_fold_by_method(rows, summary):
    text = tables.pairs(rows, summary)
    assert "<details><summary>cobra: 5 cells</summary>" in text and "<summary>dora: 1 cells</summary>" in text
    assert "| hyper | minilm, rank 2 | 3 | +10.00 |" in text and "| win |" in text
    assert "| hyper | minilm, rank 2 | 2† |" in text


def test_calibration_means_need_every_task(rows, summary):
    low, high = tables.calibration(rows, summary).split("**minilm, rank 8**")
    assert cells(low, "cobra")[1:3] == ["0.400 / 0.050 / 0.300"] * 2
    assert cells(low, "cobra")[3].startswith("0.400 ± ")
    assert cells(high, "cobra")[2:] == ["–"] * 4
    assert "foods" not in low


def test_secondary(rows, summary):
    assert cells(tables.secondary(rows, summary), "lora")[1] == "0.700 / 0.500"
    assert cells(tables.secondary(rows, summary), "lora")[3].endswith(" / 0.500 / 0.400")


def test_language_tables():
    made = [row(m, "gcide", seed=s, level=v) for m, v in (("lora", 0.7), ("cobra", 0.6)) for s in range(3)]
    summary = summarise(made, FEW)
    assert cells(tables.main(made, summary), "method") == ["method", "gcide (NLL, ↓)", "mean accuracy"]
    assert cells(tables.secondary(made, summary), "method")[1] == "gcide (perplexity)"
    shown = float(cells(tables.secondary(made, summary), "cobra")[1])
    assert shown == pytest.approx(sum(r["test"]["perplexity"] for r in made[3:]) / 3, abs=1e-3)
    (line,) = (line for line in tables.means(made, summary).splitlines() if "| cobra |" in line)
    assert "1 × language" in line and "| +1" in line and " % |" in line


def test_budget(rows, summary):
    line = next(line for line in tables.budget(rows, summary).splitlines() if "| dora |" in line)
    assert line == "| minilm, rank 2 | dora | 1,250 | +25.00 | 100 |"


def test_cost(rows, summary):
    """(4 + 14) / (4 + 10), over 9 pairs of three tasks and three seeds; evaluation took as long."""
    line = next(line for line in tables.cost(rows, summary).splitlines() if "rank 2 | cobra |" in line)
    assert line == "| minilm, rank 2 | cobra | 9 | 4.0 | 14.0 | 1.29 | 1.00 | 900 |"


def test_cost_of_other_machines_is_not_compared(rows):
    moved = [{**r, "machine": "another"} if r.get("method") == "cobra" else r for r in rows]
    line = next(line for line in tables.cost(moved, summarise(moved, FEW)).splitlines() if "rank 2 | cobra |" in line)
    assert line == "| minilm, rank 2 | cobra | 0 | – | – | – | – | 900 |"


def test_factors():
    rows = [row("cobra", task, 2, seed, "factor", level, settings=settings) for seed in range(2) for task in ("hyper", "foods")
            for settings, level in (((), 0.8), ((("beta", 0.1),), 0.82))]  # fmt: skip
    rows.append(row("cobra", "hyper", 2, 0, "factor", lr=0.1, diverged=True))
    accuracy, loss = tables.factors(rows, summarise([])).split("**minilm, rank 2, ")[1:]
    assert cells(accuracy, "changed")[1:] == ["hyper (points)", "mean", "training loss (+%)", "runs"]
    assert cells(accuracy, "reference")[1].startswith("80.0") and cells(accuracy, "reference")[3:] == ["0.500", "2"]
    assert cells(accuracy, "beta: default → 0.1")[1] == "+2.00 ± 0.00"
    assert cells(accuracy, "lr: 0.003 → 0.1")[1:] == ["–", "–", "–", "0, 1 diverged"]
    assert cells(loss, "changed")[1] == "foods (% less MSE)"
    assert cells(loss, "beta: default → 0.1")[1] == "-2.50 ± 0.00"


def test_search():
    rows = [row("cobra", task, 2, 100, "search", level, lr) for task in ("hyper", "topics")
            for lr, level in ((0.001, 0.7), (0.003, 0.8))]  # fmt: skip
    rows.append(row("cobra", "topics", 2, 100, "search", lr=0.01, diverged=True))
    rows.append(row("cobra", "hyper", 2, 100, "search", 0.6, 0.01))
    lines = tables.search(rows, "over tasks", {Choice("minilm", None, "cobra", 2): 0.003}).splitlines()[4:]
    assert lines == [
        "| cobra | lr 0.003 | 80.0 | 80.0 | 0.00 | chosen |",
        "| cobra | lr 0.001 | 70.0 | 70.0 | 10.00 |  |",
        "| cobra | lr 0.01 | 60.0 | – | diverged |  |",
    ]


def test_settings_that_lack_runs_are_not_measured_by():
    """They stand last, without a shortfall, however good the runs are that they have."""
    found = (("hyper", 0.001, 0.9), ("hyper", 0.003, 0.8), ("topics", 0.003, 0.8), ("hyper", 0.01, 0.7), ("topics", 0.01, 0.7))
    rows = [row("cobra", task, 2, 100, "search", level, lr) for task, lr, level in found]
    assert tables.search(rows, "over tasks", {}).splitlines()[4:] == [
        "| cobra | lr 0.003 | 80.0 | 80.0 | 0.00 |  |",
        "| cobra | lr 0.01 | 70.0 | 70.0 | 10.00 |  |",
        "| cobra | lr 0.001 | 90.0 | – | – |  |",
    ]


def test_runs(rows, summary):
    line = tables.runs(rows, summary).splitlines()[2]
    methods, machine = "lora, dora, adalora, cobra", "x86_64, 1 threads"
    assert line == f"| final | {len(rows) - 2} | 2 | {methods} | foods, hyper, topics | 2, 8 | 0, 1, 2, 3 | {machine} |"


def test_numbers():
    found = seeds_estimate([0.012, 0.014])
    assert number(found).startswith("0.0130 ± 0.0127")
    assert percent(found).startswith("1.3 ± 1.3")
    assert number(seeds_estimate([123.4])) == "123"
    assert (p_value(0.0004), p_value(0.0213), p_value(float("nan"))) == ("< 0.001", "0.021", "–")
    assert markdown(["a"], [["x | y"]]).splitlines()[-1] == "| x / y |"
