"""What final rows say: intervals of cells, paired gains over LoRA with corrected p-values, means over tasks; the choice of
settings on validation; and the checks that make a comparison fair.

Gains are positive where a method is better: the difference of accuracies, or by how much the loss of a regression or language
task falls, relative to LoRA's. Methods are compared on the seeds that both have. How intervals and p-values come about, and
which of them hold with 5 seeds, stands in `bench.accuracy.intervals`; verdicts use `Estimate.p`, corrected by Holm over all
cells of one method, whatever the model, rank and conditions; the forms of COBRA count as one (`cells.family_of`).
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from bench.accuracy.cells import (
    BASELINE,
    METRIC,
    Cell,
    Place,
    Runs,
    cell_of,
    condition_of,
    differing,
    family_of,
    flat,
    group,
    higher_is_better,
    matrix,
    of_phase,
    sort_methods,
    stream,
    with_fields,
)
from bench.accuracy.intervals import RESAMPLES, Estimate, estimates, holm, mean_of, relative

ALPHA = 0.05


@dataclass(frozen=True)
class Comparison:
    """A method beside LoRA in one cell. verdict: "win", "tie" or "loss", by the corrected p; "" with one seed."""

    cell: Cell
    kind: str
    method: str
    gain: Estimate
    corrected: float = math.nan
    verdict: str = ""


@dataclass(frozen=True)
class MeanOverTasks:
    """A method over all tasks of a kind at one place. level: mean accuracy, None for losses; gain: None for LoRA itself."""

    place: Place
    kind: str
    method: str
    tasks: int
    level: Estimate | None
    gain: Estimate | None
    corrected: float = math.nan


@dataclass(frozen=True)
class Summary:
    """Everything that tables and figures show of the final rows.

    runs: cell → method → seed → row; levels: accuracy or loss by cell and method; diverged: number of runs that did
    """

    runs: dict[Cell, dict[str, Runs]]
    diverged: Counter[tuple[Cell, str]]
    levels: dict[tuple[Cell, str], Estimate]
    comparisons: list[Comparison]
    means: list[MeanOverTasks]

    def kind(self, cell: Cell) -> str:
        return _kind(self.runs[cell])

    def places(self) -> list[Place]:
        """The usual conditions first."""
        return sorted({cell.place for cell in self.runs}, key=lambda place: (place.condition, place))

    def cells(self, place: Place) -> list[Cell]:
        """Classification first."""
        return sorted((cell for cell in self.runs if cell.place == place), key=lambda cell: (self.kind(cell), cell))

    def methods(self, cells: Sequence[Cell]) -> list[str]:
        finished = {method for cell in cells for method in self.runs[cell]}
        return sort_methods(finished | {method for cell, method in self.diverged if cell in cells})


def summarise(rows: Sequence[dict], resamples: int = RESAMPLES) -> Summary:
    """Levels, gains and means of the rows of phase "final"."""
    finished, diverged = of_phase(rows, "final"), of_phase(rows, "final", diverged=True)
    runs, failed = group(finished), Counter((cell_of(row), row["method"]) for row in diverged)
    levels, comparisons = {}, []
    by_stream = defaultdict(list)
    for cell in runs:
        by_stream[stream(cell)].append(cell)
    for seed, cells in by_stream.items():
        asked = [(cell, method, matrix(found)) for cell in cells for method, found in runs[cell].items()]
        paired = [(cell, method, _gain(runs[cell], method)) for cell, method, _ in asked if _shared(runs[cell], method)]
        found = iter(estimates([values for *_, values in asked + paired], seed, resamples))
        levels |= {(cell, method): next(found) for cell, method, _ in asked}
        comparisons += [Comparison(cell, _kind(runs[cell]), method, next(found)) for cell, method, _ in paired]
    comparisons = _corrected(sorted(comparisons, key=lambda c: (c.cell, sort_methods(runs[c.cell]).index(c.method))))
    comparisons = [replace(c, verdict=_verdict(c)) for c in comparisons]
    return Summary(runs, failed, levels, comparisons, _means(runs, levels, comparisons))


def win_tie_loss(comparisons: Iterable[Comparison]) -> dict[tuple[Place, str], tuple[int, int, int]]:
    """(place, method): number of cells won, tied and lost against LoRA."""
    counts = defaultdict(lambda: {"win": 0, "tie": 0, "loss": 0})
    for comparison in comparisons:
        if comparison.verdict:
            counts[comparison.cell.place, comparison.method][comparison.verdict] += 1
    return {key: (found["win"], found["tie"], found["loss"]) for key, found in counts.items()}


class Choice(NamedTuple):
    """What settings are chosen for; in the place of a task's name, None: all classification tasks, or another kind's name."""

    model: str
    task: str | None
    method: str
    rank: float
    condition: str = ""


@dataclass(frozen=True)
class Candidate:
    """Settings that were tried.

    shortfall: what they lack to the best settings of the same method, averaged over tasks: accuracy as a fraction, or relative
        loss; infinite where a run diverged, NaN where a run is missing
    values: mean validation metric by task; None without a run, or where one diverged
    """

    config: dict
    shortfall: float
    values: dict[str, float | None]
    missing: tuple[str, ...]


def candidates(rows: Iterable[dict], rule: str) -> dict[Choice, list[Candidate]]:
    """The settings tried in phase "search", best first. rule: "per task" or "over tasks".

    Rows of other phases are not looked at. Raises ValueError where a search has used the test split.
    """
    if rule not in ("per task", "over tasks"):
        raise ValueError(f'rule={rule!r} is neither "per task" nor "over tasks"')
    found = defaultdict(lambda: defaultdict(dict))
    for row in map(with_fields, rows):
        if row["phase"] != "search":
            continue
        if row.get("test") is not None:
            raise ValueError(f"row {row['key']} of the search has seen the test split; run it again on validation alone")
        over = None if row["kind"] == "classification" else row["kind"]
        where = row["average_rank"], condition_of(row)
        choice = Choice(row["model"], row["task"] if rule == "per task" else over, row["method"], *where)
        config = {k: v for k, v in row["config"].items() if k not in ("phase", "task", "seed")}
        found[choice][json.dumps(config, sort_keys=True)][row["task"], row["seed"]] = row
    return {choice: _ranked(tried) for choice, tried in sorted(found.items(), key=lambda item: (item[0][0], str(item[0])))}


def select_best(rows: Iterable[dict], rule: str) -> dict[Choice, dict]:
    """The configuration, without phase, task and seed, that is best on VALIDATION for each (model, task, method, rank).

    Only rows of phase "search" count. "over tasks" takes the smallest mean shortfall to each task's best; equal ones go to the
    smaller learning rate. Raises ValueError for searches that have seen a test split, for settings that lack runs others have,
    and where all diverged.
    """
    chosen = {}
    for choice, tried in candidates(rows, rule).items():
        where = f"{choice.method}, {Place(choice.model, choice.rank, choice.condition)}, {choice.task or 'all tasks'}"
        for candidate in tried:
            if candidate.missing:
                settings, missing = describe(candidate.config, tried[0].config), ", ".join(candidate.missing)
                raise ValueError(f"{where}: settings {settings} have no run of {missing}; finish the search first")
        if math.isinf(tried[0].shortfall):
            raise ValueError(f"{where}: all settings diverged; search smaller rates")
        chosen[choice] = tried[0].config
    return chosen


def describe(config: dict, beside: dict) -> str:
    """The learning rate, and what else differs from another configuration."""
    names = ["lr", *sorted(differing(config, beside) - {"lr"})]
    return ", ".join(f"{name} {flat(config).get(name, '–')}" for name in names)


def check_equal_budget(rows: Iterable[dict], tolerance: float = 0.01, exempt: Collection[str | tuple[str, float]] = ()) -> None:
    """Raises ValueError naming the cells whose trainable parameters differ between methods by more than `tolerance`, or whose
    heads differ at all.

    exempt: methods, or methods at a rank, whose adapter parameters are reported rather than required to be equal; their heads
        count all the same
    """
    wrong = []
    for cell, methods in group([with_fields(row) for row in rows if "diverged" not in row]).items():
        where = f"{cell.task}, {cell.place}"
        heads = {(method, row["head_parameters"]) for method, runs in methods.items() for row in runs.values()}
        if len({head for _, head in heads}) > 1:
            wrong.append(f"{where}: heads of {_listed(heads)} parameters")
        checked = [m for m in methods if not {m, (m, cell.rank)} & set(exempt)]
        sizes = {(m, row["trainable_parameters"]) for m in checked for row in methods[m].values()}
        numbers = [size for _, size in sizes]
        if sizes and max(numbers) > (1 + tolerance) * min(numbers):
            wrong.append(f"{where}: {_listed(sizes)} trainable parameters")
    if wrong:
        raise ValueError(
            f"budgets differ by more than {tolerance:.0%}; run these again at one budget:\n  " + "\n  ".join(wrong)
        )


def _listed(sizes: set[tuple[str, int]]) -> str:
    return ", ".join(f"{method} {size:,}" for method, size in sorted(sizes))


def _kind(methods: dict[str, Runs]) -> str:
    return next(row["kind"] for runs in methods.values() for row in runs.values())


def _shared(methods: dict[str, Runs], method: str) -> list[int]:
    return [] if method == BASELINE else sorted(methods[method].keys() & methods.get(BASELINE, {}).keys())


def _gain(methods: dict[str, Runs], method: str) -> np.ndarray:
    """(seeds, examples), positive where the method is better than LoRA."""
    seeds = _shared(methods, method)
    ours, theirs = matrix(methods[method], seeds), matrix(methods[BASELINE], seeds)
    if ours.shape != theirs.shape:
        raise ValueError(f"{method} and {BASELINE} have test splits of {ours.shape[1]} and {theirs.shape[1]} examples")
    return ours - theirs if higher_is_better(_kind(methods)) else -relative(ours, theirs)


def _corrected(found: list) -> list:
    """With Holm's p over all that a family of methods has."""
    out = list(found)
    for name in {family_of(c.method) for c in found}:
        family = [i for i, c in enumerate(found) if family_of(c.method) == name and c.gain is not None]
        for i, p in zip(family, holm([found[i].gain.p for i in family]), strict=True):
            out[i] = replace(found[i], corrected=p)
    return out


def _verdict(comparison: Comparison) -> str:
    if math.isnan(comparison.corrected):
        return ""
    if comparison.corrected >= ALPHA:
        return "tie"
    return "win" if comparison.gain.mean > 0 else "loss"


def _means(runs, levels, comparisons) -> list[MeanOverTasks]:
    """Of methods that have every task of the kind at that rank; a mean over fewer tasks is another quantity."""
    gains = {(c.cell, c.method): c.gain for c in comparisons}
    by_kind = defaultdict(list)
    for cell in runs:
        by_kind[cell.place, _kind(runs[cell])].append(cell)
    means = []
    for (place, kind), cells in sorted(by_kind.items(), key=lambda item: (item[0][0].condition, item[0])):
        for method in sort_methods(method for cell in cells for method in runs[cell]):
            level = [levels[cell, method] for cell in cells if (cell, method) in levels]
            gain = [gains[cell, method] for cell in cells if (cell, method) in gains]
            if len(level) == len(cells):
                shown = mean_of(level) if kind == "classification" else None
                compared = mean_of(gain) if len(gain) == len(cells) else None
                means.append(MeanOverTasks(place, kind, method, len(cells), shown, compared))
    return _corrected(means)


def _ranked(tried: dict[str, dict[tuple[str, int], dict]]) -> list[Candidate]:
    """Settings of one choice, by what they lack on average; those with missing runs last."""
    needed = {run for runs in tried.values() for run in runs}
    tasks = sorted({task for task, _ in needed})
    values = {config: {task: _mean_validation(runs, task) for task in tasks} for config, runs in tried.items()}
    whole = [config for config, runs in tried.items() if runs.keys() >= needed] or list(tried)
    best = {task: _best([values[config][task] for config in whole], _kind_of(tried, task)) for task in tasks}
    out = []
    for config, runs in tried.items():
        missing = tuple(f"{task} seed {seed}" for task, seed in sorted(needed - runs.keys()))
        lacks = [_shortfall(values[config][task], best[task], _kind_of(tried, task)) for task in tasks]
        shortfall = math.nan if missing else math.fsum(lacks) / len(lacks)
        out.append(Candidate(json.loads(config), shortfall, values[config], missing))
    return sorted(
        out, key=lambda c: (bool(c.missing), 0.0 if c.missing else round(c.shortfall, 9), c.config["lr"], str(c.config))
    )


def _mean_validation(runs: dict[tuple[str, int], dict], task: str) -> float | None:
    """None without a run, or where one diverged."""
    rows = [row for (name, _), row in runs.items() if name == task]
    if not rows or any("diverged" in row for row in rows):
        return None
    return math.fsum(row["validation"][METRIC[row["kind"]]] for row in rows) / len(rows)


def _kind_of(tried: dict[str, dict[tuple[str, int], dict]], task: str) -> str:
    """Of a task; a diverged run does not know it."""
    rows = (row for runs in tried.values() for row in runs.values())
    return next((row["kind"] for row in rows if row["task"] == task and "kind" in row), "classification")


def _best(values: Sequence[float | None], kind: str) -> float | None:
    known = [value for value in values if value is not None]
    return (max if higher_is_better(kind) else min)(known, default=None)


def _shortfall(value: float | None, best: float | None, kind: str) -> float:
    if value is None or best is None:
        return math.inf
    return best - value if higher_is_better(kind) else value / best - 1
