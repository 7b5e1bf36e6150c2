"""Which runs there are, and `python -m bench.accuracy.grid PHASE --minutes M`: runs those that have no row yet.

Several of these processes share the work; each takes the next run that nobody is at. A run that diverged is stored as such, and
not tried again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.accuracy.recipe import PHASES, Recipe
from bench.accuracy.rows import append_row, claim, read_rows
from bench.accuracy.run import Diverged, run
from bench.accuracy.statistics import select_best

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
FURTHER = {"adalora": (1.6e-2,)}  # where the best of them was the last
SEEDS = (0, 1, 2, 3, 4)
PEERS = ("lora", "cobra", "adalora")
METHODS = (*PEERS, "paper")
SEARCH_SEED = 100  # of no final run
TASKS = ("supersense", "rt", "crowd", "kotz", "trec")
SEARCH_TASKS = ("supersense", "rt", "trec")
FACTOR_TASKS = ("supersense", "rt")

# what the forms differ in is spelled out, so that their rows keep their meaning when these defaults change
PAPER = {
    "gate": "concrete",
    "prior_scale": "literal",
    "prior_level": "group",
    "fusion": "product",
    "gamma": 5.0,
    "beta": 0.01,
    "open_probability": 0.5,
    "init": "uniform",
    "gate_lr_scale": 1.0,
    "lora_B_lr_scale": 1.0,
    "r_max_multiple": 2,
    "cut": 1.0,
}
COBRA = {
    **PAPER,
    "prior_scale": "log",
    "gamma": 1.0,
    "open_probability": 0.9,
    "init": "gradient",
    "minimum": 1,
    "cut": 0.4,
}
SETTINGS = {"paper": PAPER, "cobra": COBRA}
FACTORS = (
    {},
    {"gate": "open", "r_max_multiple": 1},
    {"init": "uniform"},
    {"minimum": 1},
    {"fusion": "gradient"},
    {"fusion": "contribution"},
    {"prior_level": "group"},
    {"gate_lr_scale": 30.0},
    {"prior_level": "group", "minimum": 1},
    {"prior_level": "group", "minimum": 1, "init": "uniform"},
    {"gate": "concrete"},
    {"cut": 0.1},
    {"gamma": 0.0},
    {"lora_B_lr_scale": 8.0},
    {"open_probability": 0.5},
    {"r_max_multiple": 4},
    {"fusion": "sum"},
    {"gate": "straight_through"},
    {"cut": 0.8},
    {"beta": 1.0},
)
FACTOR_RATE = 2e-3
FACTOR_REFERENCE = {
    **PAPER,
    "gate": "mean",
    "prior_scale": "log",
    "prior_level": "rank",
    "gamma": 1.0,
    "open_probability": 0.95,
    "init": "gradient",
    "cut": 0.4,
}


def search() -> Iterator[Recipe]:
    """The same learning rates for every method, and more until they get worse; on validation, at the small budget."""
    for method in METHODS:
        for task in SEARCH_TASKS:
            for rate in (*RATES, *FURTHER.get(method, ())):
                yield _recipe("search", task, method, 2, rate, SEARCH_SEED)


def factor() -> Iterator[Recipe]:
    """One factor at a time from `FACTOR_REFERENCE`, and LoRA, on validation."""
    for seed in (SEARCH_SEED, SEARCH_SEED + 1):
        for task in FACTOR_TASKS:
            yield _recipe("factor", task, "lora", 2, FACTOR_RATE, seed)
        for change in FACTORS:
            for task in FACTOR_TASKS:
                settings = tuple({**FACTOR_REFERENCE, **change}.items())
                yield Recipe("factor", task, "cobra", 2, FACTOR_RATE, seed, settings=settings)


def final() -> Iterator[Recipe]:
    """Every method at the rate that its search found, on test."""
    rates = _rates()
    cells = [(2, PEERS, SEEDS), (2, ("paper",), SEEDS[:3]), (8, PEERS, SEEDS), (8, ("paper",), SEEDS[:3])]
    for rank, methods, seeds in cells:
        for seed in seeds:
            for task in TASKS:
                for method in methods:
                    yield _recipe("final", task, method, rank, rates[method], seed)


def _rates() -> dict[str, float]:
    """Method -> learning rate with the best mean over the search tasks."""
    return {choice.method: config["lr"] for choice, config in select_best(read_rows(), "over tasks").items()}


def _recipe(phase: str, task: str, method: str, rank: int, rate: float, seed: int) -> Recipe:
    return Recipe(phase, task, method, rank, rate, seed, settings=tuple(SETTINGS.get(method, {}).items()))


def work(phase: str, minutes: float, data: Path | None) -> None:
    """Fills missing rows of a phase, in order, and starts none after the time is up."""
    until = time.monotonic() + 60 * minutes
    planned = list({"search": search, "factor": factor, "final": final}[phase]())
    for recipe in planned:
        if time.monotonic() > until:
            break
        with claim(recipe.key) as mine:
            if mine and recipe.key not in _done():
                print(f"{time.strftime('%H:%M:%S')} {_title(recipe)}", flush=True)
                append_row(_row(recipe, data))
    done = _done()
    print(f"{sum(recipe.key in done for recipe in planned)} of {len(planned)} rows of phase {phase} are there")


def _done() -> set[str]:
    return {row["key"] for row in read_rows()}


def _title(recipe: Recipe) -> str:
    return f"{recipe.task} {recipe.method} rank {recipe.average_rank:g} lr {recipe.lr:g} seed {recipe.seed}"


def _row(recipe: Recipe, data: Path | None) -> dict:
    try:
        return run(recipe, data)
    except Diverged as error:
        return {"key": recipe.key, "phase": recipe.phase, "config": recipe.to_dict(), "diverged": str(error)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, help="folder of published sets (GLUE, TREC, FiQA, GSM8K)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work(options.phase, options.minutes, options.data)


if __name__ == "__main__":
    main()
