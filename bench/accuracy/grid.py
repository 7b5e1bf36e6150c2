"""Which runs there are, and `python -m bench.accuracy.grid PHASE --minutes M`: runs those that have no row yet.

Several of these processes share the work; each takes the next run that nobody is at. A run that diverged is stored as such, and
not tried again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.accuracy.recipe import PHASES, Recipe
from bench.accuracy.rows import append_row, claim, read_rows
from bench.accuracy.run import run

RATES = (1e-3, 3e-3, 1e-2)
SEARCH_TASKS = ("hyper", "supersense")


def search() -> Iterator[Recipe]:
    """The same rates for every method, on validation."""
    for rank in (2, 8):
        for task in SEARCH_TASKS:
            for rate in RATES:
                for method in ("lora", "adalora"):
                    yield Recipe("search", task, method, rank, rate, seed=100)


def recipes(phase: str) -> list[Recipe]:
    return list({"search": search}[phase]())


def work(phase: str, minutes: float, data: Path | None) -> None:
    """Fills missing rows of a phase, in order, and starts none after the time is up."""
    until = time.monotonic() + 60 * minutes
    planned = recipes(phase)
    for recipe in planned:
        if time.monotonic() > until:
            break
        with claim(recipe.key) as mine:
            if not mine or recipe.key in {row["key"] for row in read_rows()}:
                continue
            print(f"{time.strftime('%H:%M:%S')} {recipe.task} {recipe.method} r={recipe.average_rank:g} lr={recipe.lr:g} "
                  f"seed {recipe.seed} {recipe.options or ''}", flush=True)  # fmt: skip
            append_row(_row(recipe, data))
    done = {row["key"] for row in read_rows()}
    print(f"{sum(recipe.key in done for recipe in planned)} of {len(planned)} rows of phase {phase} are there")


def _row(recipe: Recipe, data: Path | None) -> dict:
    try:
        return run(recipe, data)
    except ValueError as error:
        if "the loss of step" not in str(error) and "diverged" not in str(error):
            raise
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
    sys.exit(main())
