"""Which runs there are, and `python -m bench.accuracy.grid PHASE --minutes M`: runs those that have no row yet.

Several of these processes share the work; each takes the next run that nobody is at. A run that diverged is stored as such, and
not tried again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch

from bench.accuracy.forms import (
    COBRA,
    DEFAULT_PARTS,
    FACTOR_REFERENCE,
    FACTORS,
    FEW_LAYERS,
    LONG_COBRA,
    LORA_PARTS,
    PAPER,
    PUBLISHED_PARTS,
    REGRESSION_PARTS,
    SHORT_PARTS,
    SINGULAR,
    SINGULAR_PARTS,
    TIGHT,
    TIGHT_PARTS,
    WIDE_PARTS,
)
from bench.accuracy.recipe import PHASES, Recipe
from bench.accuracy.rows import append_row, claim, read_rows
from bench.accuracy.run import Diverged, run
from bench.accuracy.searches import (
    FEW,
    GLUE,
    GRADED,
    HEADLINE,
    LANGUAGE,
    LARGER,
    LONG,
    LONG_TEXTS,
    LONGER,
    MORE,
    NOISY,
    PEERS,
    QUARTER,
    REGRESSIONS,
    SEARCH_SEED,
    SEARCH_SEEDS,
    SEARCH_TASKS,
    SHORT,
    TASKS,
    VARIANTS,
    WHOLE,
    rates_of,
    recipe_for,
    search,
)
from bench.accuracy.tasks import kind_of

SEEDS = (0, 1, 2, 3, 4)
# take the rate of the method that they are forms of
LIKE = {"random": "lora", "plan": "lora", "cobra+long+quick": "cobra+long", "cobra+quick": "cobra"}
FACTOR_TASKS = ("supersense", "rt")
FACTOR_RATE = 2e-3
CALIBRATION = ("estimator", "path_points", "calibration_examples")  # fields of a recipe, where other changes are settings


def factor() -> Iterator[Recipe]:
    """One factor at a time on validation: from `FACTOR_REFERENCE`, beside LoRA, on classification; from COBRA's form, on
    regressions."""
    for seed in (SEARCH_SEED, SEARCH_SEED + 1):
        for task in FACTOR_TASKS:
            yield recipe_for("factor", task, "lora", 2, FACTOR_RATE, seed)
        for change in FACTORS:
            for task in FACTOR_TASKS:
                settings = tuple({**FACTOR_REFERENCE, **change}.items())
                yield Recipe("factor", task, "cobra", 2, FACTOR_RATE, seed, settings=settings)
    if best := rates_of(read_rows(), "regression", 2, {}).get("cobra+long"):
        for change, task in product(WIDE_PARTS, REGRESSIONS):
            yield _changed("factor", task, "cobra", 2, best, SEARCH_SEED, LONG_COBRA, change)


def ablation() -> Iterator[Recipe]:
    """On validation: COBRA's forms without their parts, on regressions, in a short training and at a ninth of the parameters;
    the published form with and without each of them, on classification; the singular one with other widths, cuts and starts;
    LoRA with another alpha."""
    rows = read_rows()
    studies = (
        (REGRESSIONS, 2, {}, "singular", SINGULAR, SINGULAR_PARTS),
        (REGRESSIONS, 2, {}, "cobra+long", LONG_COBRA, REGRESSION_PARTS),
        (FACTOR_TASKS, 2, {}, "paper", PAPER, PUBLISHED_PARTS),
        (FACTOR_TASKS, 2, SHORT, "cobra+long", LONG_COBRA, SHORT_PARTS),
        (FACTOR_TASKS, TIGHT, {}, "cobra+long", FEW_LAYERS["cobra+long"], TIGHT_PARTS),
        (REGRESSIONS, 2, {}, "lora", {}, LORA_PARTS),
        (REGRESSIONS, 2, {}, "cobra", COBRA, DEFAULT_PARTS),
    )
    found = {}
    for tasks, rank, conditions, searched, form, changes in studies:
        method = "cobra" if searched in ("paper", "cobra+long") else searched  # forms differ in their settings
        # below rank 1 at rank 2's rate, half of what a search there found later
        if best := rates_of(rows, kind_of(tasks[0]), max(rank, 2), conditions).get(searched):
            for seed, change, task in product(SEARCH_SEEDS, changes, tasks):
                recipe = _changed("ablation", task, method, rank, best, seed, form, change, **conditions)
                found[recipe.key] = recipe  # of two forms at one rate one may be a change of the other
    yield from found.values()


def final() -> Iterator[Recipe]:
    """Every method at the rate that its search found for this kind of task, rank and conditions, on test."""
    few, rows = SEEDS[:3], read_rows()
    cells = (
        (TASKS, 2, {}, PEERS, SEEDS),
        (REGRESSIONS, 2, {}, PEERS, SEEDS),
        (TASKS, 2, {}, ("full",), few),
        (TASKS, 8, {}, PEERS, SEEDS),
        (TASKS, 2, {}, ("singular",), SEEDS),
        (REGRESSIONS, 8, {}, PEERS, SEEDS),
        (REGRESSIONS, 2, {}, ("singular",), SEEDS),
        (REGRESSIONS, 8, {}, ("singular",), SEEDS),
        (REGRESSIONS, 2, WHOLE, ("lora",), SEEDS),
        (REGRESSIONS, 2, QUARTER, ("lora",), SEEDS),
        (GRADED[:1], 2, MORE, (*HEADLINE, "cobra+long+quick", "cobra+quick"), SEEDS),
        (REGRESSIONS, 2, {}, ("loraplus", "cobra+long+quick"), SEEDS),
        (TASKS, 2, {}, ("cobra+long+quick",), few),
        (REGRESSIONS, 8, {}, ("cobra+long+quick",), SEEDS),
        (TASKS, 2, SHORT, PEERS, few),
        (REGRESSIONS, 2, {}, ("cobra", "cobra+quick"), SEEDS),
        (TASKS, 2, {}, ("cobra",), SEEDS),
        (TASKS, 2, {}, ("cobra+quick",), few),
        (REGRESSIONS, 8, {}, ("cobra",), SEEDS),
        (TASKS, 8, {}, ("cobra",), SEEDS),
        (TASKS, 2, {}, VARIANTS, few),
        (TASKS, 2, {}, ("paper",), few),
        (LANGUAGE[:1], 2, {}, HEADLINE, few),
        (TASKS, 2, SHORT, ("singular", "cobra"), few),
        (TASKS, TIGHT, {}, ("cobra+long", "lora", "singular", "cobra+singular"), few),
        (GLUE, 2, FEW, HEADLINE, few),
        ((*REGRESSIONS, *GRADED), 2, FEW, (*HEADLINE, "singular"), few),
        (REGRESSIONS, 32, {}, HEADLINE, few),
        (REGRESSIONS, 2, {}, ("random", "plan"), few),
        (REGRESSIONS, 2, LONG, HEADLINE, few),
        (TASKS, TIGHT, {}, ("random",), few),
        (LANGUAGE[1:], 2, {}, HEADLINE, few),
        (LONG_TEXTS, 2, LONGER, HEADLINE, few),
        (LANGUAGE[:1], 2, {}, PEERS[2:], few),
        (SEARCH_TASKS, 2, NOISY, HEADLINE, few),
        (TASKS, 32, {}, HEADLINE, few),
        (REGRESSIONS, 2, LARGER, HEADLINE, few),
        (LANGUAGE[1:], 2, {}, PEERS[2:], few),
    )
    for tasks, rank, conditions, methods, seeds in cells:
        rates = rates_of(rows, kind_of(tasks[0]), rank, conditions)
        for seed, task, method in product(seeds, tasks, methods):
            if rate := rates.get(LIKE.get(method, method)):
                yield recipe_for("final", task, method, rank, rate, seed, **conditions)


def _changed(
    phase: str, task: str, method: str, rank: float, rate: float, seed: int, form: dict, change: dict, **conditions: object
) -> Recipe:
    """A form with changes of settings, of its calibration, or of "lr", a multiple of the rate."""
    measured = {name: value for name, value in change.items() if name in CALIBRATION}
    settings = {**form, **{name: value for name, value in change.items() if name not in (*CALIBRATION, "lr")}}
    lr = rate * change.get("lr", 1.0)
    return Recipe(phase, task, method, rank, lr, seed, settings=tuple(settings.items()), **conditions, **measured)


def work(phase: str, minutes: float, data: Path | None, device: str = "cpu") -> None:
    """Fills missing rows of a phase, in order, and starts none after the time is up."""
    until = time.monotonic() + 60 * minutes
    planned = list({"search": search, "factor": factor, "ablation": ablation, "final": final}[phase]())
    for recipe in planned:
        if time.monotonic() > until:
            break
        with claim(recipe.key) as mine:
            if mine and recipe.key not in _done():
                print(f"{time.strftime('%H:%M:%S')} {_title(recipe)}", flush=True)
                append_row(_row(recipe, data, device))
    done = _done()
    print(f"{sum(recipe.key in done for recipe in planned)} of {len(planned)} rows of phase {phase} are there")


def _done() -> set[str]:
    return {row["key"] for row in read_rows()}


def _title(recipe: Recipe) -> str:
    return f"{recipe.task} {recipe.method} rank {recipe.average_rank:g} lr {recipe.lr:g} seed {recipe.seed}"


def _row(recipe: Recipe, data: Path | None, device: str) -> dict:
    try:
        return run(recipe, data, device)
    except Diverged as error:
        found = {"phase": recipe.phase, "kind": kind_of(recipe.task), "config": recipe.to_dict()}
        return {"key": recipe.key, **found, "diverged": str(error)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, help="folder of published sets (GLUE, TREC, FiQA, GSM8K)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work(options.phase, options.minutes, options.data, options.device)


if __name__ == "__main__":
    main()
