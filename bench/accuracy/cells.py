"""Rows to cells: which runs are compared with each other, and the results of their test examples as matrices."""

from __future__ import annotations

import dataclasses
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from bench.accuracy.forms import FORMS
from bench.accuracy.metrics import unpack_per_example
from bench.accuracy.recipe import TEXTS, Recipe

METRIC = {"classification": "accuracy", "regression": "mse", "language": "nll"}
BASELINE = "lora"
# what belongs to the task rather than to a method; cells in which it is not the usual say so
CONDITIONS = ("examples", "noise", "steps", "batch_size", "max_length")
ORDER = (
    "lora", "rslora", "loraplus", "dora", "eva", "adalora", "uniform", "random", "plan", "singular", "paper", "cobra",
    "cobra+quick", "cobra+long", "cobra+long+quick", "cobra+singular", "full",
)  # fmt: skip


class Place(NamedTuple):
    """What cells of one table have in common. condition: "" for the usual ones, or what is unusual, as "steps 50"."""

    model: str
    rank: float
    condition: str = ""

    def __str__(self) -> str:
        return ", ".join([self.model, f"rank {self.rank:.2g}", *filter(None, [self.condition])])


class Cell(NamedTuple):
    """Runs that differ in method and seed only."""

    model: str
    task: str
    rank: float
    condition: str = ""

    @property
    def place(self) -> Place:
        return Place(self.model, self.rank, self.condition)


Runs = dict[int, dict]
"""seed: row"""


def of_phase(rows: Iterable[dict], phase: str, diverged: bool = False) -> list[dict]:
    """Finished rows of a phase, or those whose training diverged."""
    return [with_fields(row) for row in rows if row["phase"] == phase and ("diverged" in row) == diverged]


def with_fields(row: dict) -> dict:
    """The row with the fields that a diverged run has in its configuration only."""
    return {**{name: row["config"][name] for name in ("model", "task", "method", "average_rank", "seed")}, **row}


def method_order(method: str) -> tuple[int, str]:
    """The baseline, its variants, adaptive peers, then COBRA."""
    return (ORDER.index(method), "") if method in ORDER else (len(ORDER), method)


def sort_methods(methods: Iterable[str]) -> list[str]:
    return sorted(set(methods), key=method_order)


def family_of(method: str) -> str:
    """What p-values are corrected over: the forms of COBRA are one method, wherever they were run."""
    return FORMS[0] if method in FORMS else method


def higher_is_better(kind: str) -> bool:
    return kind == "classification"


def condition_of(row: dict) -> str:
    """Names and values of the conditions that are not the usual ones of the row's kind of task, as "steps 50"."""
    usual = {field.name: field.default for field in dataclasses.fields(Recipe)}
    usual |= TEXTS if row.get("kind") == "language" else {}
    unusual = [name for name in CONDITIONS if row["config"].get(name, usual[name]) != usual[name]]
    return ", ".join(f"{name.replace('_', ' ')} {row['config'][name]}" for name in unusual)


def cell_of(row: dict) -> Cell:
    return Cell(row["model"], row["task"], row["average_rank"], condition_of(row))


def group(rows: Sequence[dict]) -> dict[Cell, dict[str, Runs]]:
    """Cell → method → seed → row. Raises ValueError where a method has two rows of one seed."""
    cells = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        cell = cell_of(row)
        runs = cells[cell][row["method"]]
        other = runs.setdefault(row["seed"], row)
        if other is not row:
            differ = sorted(differing(other["config"], row["config"]))
            raise ValueError(
                f"{row['method']} on {cell.task}, {cell.place}, seed {row['seed']} has two {row['phase']} rows, "
                f"{other['key']} and {row['key']}, which differ in {', '.join(differ) or 'nothing'}; keep one"
            )
    return {cell: {m: dict(sorted(cells[cell][m].items())) for m in sort_methods(cells[cell])} for cell in sorted(cells)}


def flat(config: dict) -> dict[str, object]:
    """Settings beside the other fields."""
    return {**{k: v for k, v in config.items() if k != "settings"}, **config.get("settings", {})}


def differing(one: dict, other: dict) -> set[str]:
    """Names of fields and settings in which two configurations differ."""
    one, other = flat(one), flat(other)
    missing = object()
    return {name for name in one.keys() | other.keys() if one.get(name, missing) != other.get(name, missing)}


def matrix(runs: Runs, seeds: Iterable[int] | None = None) -> np.ndarray:
    """(seeds, examples) test results: 1 for a correct answer, or the loss.

    Raises ValueError where seeds have test splits of different sizes, or the examples do not average to the row's metric.
    """
    chosen = [runs[seed] for seed in (runs if seeds is None else seeds)]
    values = [_per_example(row) for row in chosen]
    if len({len(v) for v in values}) > 1:
        sizes = {row["key"]: len(v) for row, v in zip(chosen, values, strict=True)}
        raise ValueError(f"rows of one cell have test splits of different sizes: {sizes}; run them again on one split")
    return np.stack(values)


def stream(cell: Cell) -> int:
    """Seed of the resampling: one a task, so that ranks and methods share draws and tasks do not."""
    return zlib.crc32(f"{cell.model} {cell.task}".encode())


def _per_example(row: dict) -> np.ndarray:
    test, metric = row["test"], METRIC[row["kind"]]
    if not test or "per_example" not in test:
        raise ValueError(f"row {row['key']} ({row['method']} on {row['task']}) has no results of test examples; run it again")
    values = unpack_per_example(test["per_example"]).astype(float)
    if abs(values.mean() - test[metric]) > 1e-4 * max(1.0, abs(test[metric])):
        raise ValueError(f"row {row['key']}: test examples average to {values.mean():.6g}, its {metric} is {test[metric]:.6g}")
    return values
