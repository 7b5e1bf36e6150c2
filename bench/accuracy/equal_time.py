"""COBRA beside a LoRA that trains for as long: it has the steps of `SAME_TIME`, and COBRA those of every method."""

from __future__ import annotations

from collections.abc import Sequence

from bench.accuracy.cells import BASELINE, of_phase
from bench.accuracy.formats import MISSING, interval, markdown, number, p_value
from bench.accuracy.intervals import Estimate
from bench.accuracy.recipe import Recipe
from bench.accuracy.searches import SAME_TIME
from bench.accuracy.statistics import Summary, summarise

METHOD = "cobra"


def rows_of(rows: Sequence[dict]) -> list[dict]:
    """LoRA's final rows of more steps, as if they had the usual number, and COBRA's of the same tasks, ranks and seeds."""
    final = of_phase(rows, "final")
    longer = {_run(row): row for row in final if row["method"] == BASELINE and _has(row, SAME_TIME)}
    usual = {"steps": Recipe.__dataclass_fields__["steps"].default}
    beside = [row for row in final if row["method"] == METHOD and _has(row, usual) and _run(row) in longer]
    return [{**row, "config": {**row["config"], **usual}} for row in longer.values()] + beside


def table(rows: Sequence[dict], summary: Summary) -> str:
    """A line a task, and the mean of every kind and rank."""
    found = summarise(rows_of(rows))
    out = []
    for each in found.comparisons:
        levels = [number(found.levels[each.cell, method]) for method in (BASELINE, METHOD)]
        out.append((each.cell.task, str(each.cell.place), *levels, *_tested(each.gain)))
    for mean in found.means:
        if mean.gain:
            out.append((f"mean of {mean.tasks}", str(mean.place), MISSING, MISSING, *_tested(mean.gain)))
    header = ("task", "at", f"LoRA, {SAME_TIME['steps']} steps (MSE, ↓)", "COBRA (MSE, ↓)", "% less MSE", "95 % interval", "p")
    return markdown(header, out)


def _tested(gain: Estimate) -> tuple[str, str, str]:
    return f"{100 * gain.mean:+.2f}", interval(gain, " %"), p_value(gain.p)


def _run(row: dict) -> tuple:
    return row["model"], row["task"], row["average_rank"], row["seed"]


def _has(row: dict, fields: dict) -> bool:
    return all(row["config"][name] == value for name, value in fields.items())
