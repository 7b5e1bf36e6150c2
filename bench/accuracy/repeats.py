"""Runs that were made twice, in two phases of the grid: how far one recipe is from itself."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from statistics import fmean
from typing import NamedTuple

from bench.accuracy.cells import METRIC, higher_is_better
from bench.accuracy.formats import markdown
from bench.accuracy.statistics import Summary


class Repeat(NamedTuple):
    """change: of the validation metric from one run to the other: of accuracies the difference, of losses the relative one"""

    kind: str
    same_machine: bool
    change: float


def repeats(rows: Sequence[dict]) -> Iterator[Repeat]:
    """Of all finished rows whose recipes differ in their phase alone, the pairs."""
    made = defaultdict(list)
    for row in rows:
        if "diverged" not in row:
            made[json.dumps({**row["config"], "phase": ""}, sort_keys=True)].append(row)
    for runs in made.values():
        for first, second in combinations(runs, 2):
            yield Repeat(first["kind"], first["machine"] == second["machine"], _change(first, second))


def table(rows: Sequence[dict], summary: Summary) -> str:
    """By kind of task and whether both runs are of one machine."""
    found = defaultdict(list)
    for repeat in repeats(rows):
        found[repeat.kind, repeat.same_machine].append(repeat.change)
    out = []
    for (kind, same), changes in sorted(found.items(), reverse=True):
        spread = fmean(change**2 for change in changes) ** 0.5
        sizes = (f"{100 * size:.2f}{'' if higher_is_better(kind) else ' %'}" for size in (spread, max(map(abs, changes))))
        out.append((kind, "one" if same else "two", f"{len(changes)}", f"{changes.count(0.0)}", *sizes))
    header = ("tasks", "machines", "pairs", "with equal results", "root mean square difference on validation", "largest")
    return markdown(header, out)


def _change(first: dict, second: dict) -> float:
    before, after = (row["validation"][METRIC[row["kind"]]] for row in (first, second))
    return after - before if higher_is_better(first["kind"]) else after / before - 1
