"""Forms of COBRA beside a LoRA that trains for as long: it has the steps of `SAME_TIME`, and they those of every method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.accuracy.cells import BASELINE, of_phase
from bench.accuracy.formats import MISSING, interval, markdown, number, p_value
from bench.accuracy.intervals import Estimate
from bench.accuracy.recipe import Recipe
from bench.accuracy.searches import SAME_TIME
from bench.accuracy.statistics import Summary, summarise


def rows_of(rows: Sequence[dict], method: str) -> list[dict]:
    """LoRA's final rows of as many steps as this form takes time, as if they had the usual number, and the form's of the same
    tasks, ranks and seeds."""
    final = of_phase(rows, "final")
    longer = {_run(row): row for row in final if row["method"] == BASELINE and _has(row, SAME_TIME[method])}
    usual = {"steps": Recipe.__dataclass_fields__["steps"].default}
    beside = [row for row in final if row["method"] == method and _has(row, usual) and _run(row) in longer]
    return [{**row, "config": {**row["config"], **usual}} for row in longer.values()] + beside


def table(rows: Sequence[dict], summary: Summary) -> str:
    """For every form a line a task, and the mean of every kind and rank."""
    header = (
        "method",
        "task",
        "at",
        "LoRA's steps",
        "LoRA (MSE, ↓)",
        "method (MSE, ↓)",
        "% less MSE",
        "95 % interval",
        "p",
    )
    return markdown(header, [line for method in SAME_TIME for line in _lines(method, summarise(rows_of(rows, method)))])


def _lines(method: str, found: Summary) -> Iterator[tuple[str, ...]]:
    steps = str(SAME_TIME[method]["steps"])
    for each in found.comparisons:
        levels = [number(found.levels[each.cell, name]) for name in (BASELINE, method)]
        yield method, each.cell.task, str(each.cell.place), steps, *levels, *_tested(each.gain)
    for mean in found.means:
        if mean.gain:
            yield method, f"mean of {mean.tasks}", str(mean.place), steps, MISSING, MISSING, *_tested(mean.gain)


def _tested(gain: Estimate) -> tuple[str, str, str]:
    return f"{100 * gain.mean:+.2f}", interval(gain, " %"), p_value(gain.p)


def _run(row: dict) -> tuple:
    return row["model"], row["task"], row["average_rank"], row["seed"]


def _has(row: dict, fields: dict) -> bool:
    return all(row["config"][name] == value for name, value in fields.items())
