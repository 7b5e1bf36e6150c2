"""Which runs there are, and `python -m bench.accuracy.grid PHASE --minutes M`: runs those that have no row yet.

Several of these processes share the work; each takes the next run that nobody is at. A run that diverged is stored as such, and
not tried again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from bench.accuracy.forms import (
    COBRA,
    FACTOR_REFERENCE,
    FACTORS,
    FEW_LAYERS,
    PAPER,
    PUBLISHED_PARTS,
    REGRESSION_PARTS,
    SETTINGS,
    SHORT_PARTS,
    SINGULAR,
    SINGULAR_PARTS,
    TIGHT,
    TIGHT_PARTS,
    WIDE_PARTS,
)
from bench.accuracy.recipe import PHASES, TEXTS, Recipe
from bench.accuracy.rows import append_row, claim, read_rows
from bench.accuracy.run import Diverged, run
from bench.accuracy.statistics import select_best
from bench.accuracy.tasks import kind_of

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (0, 1, 2, 3, 4)
PEERS = ("lora", "cobra", "adalora")
METHODS = (*PEERS, "paper")
VARIANTS = ("rslora", "dora", "eva")
LIKE = {"random": "lora", "plan": "lora"}  # controls take the rate of the method that they are plain forms of
SEARCH_SEED = 100  # of no final run
TASKS = ("supersense", "rt", "crowd", "kotz", "trec")
SEARCH_TASKS = ("supersense", "rt", "trec")
REGRESSIONS = ("tweets", "amazon")
LANGUAGE = ("gcide", "gsm8k")
LONG_TEXTS = ("hyper", "foods")
GLUE = ("sst2", "cola", "mrpc", "rte")
GRADED = ("stsb", "fiqa")
FACTOR_TASKS = ("supersense", "rt")
FACTOR_RATE = 2e-3
SHORT = {"steps": 50}
LONG = {"steps": 600}
FEW = {"examples": 500}
NOISY = {"noise": 0.3}
LARGER = {"model": "mpnet"}
LONGER = {"max_length": 128}
CALIBRATION = ("estimator", "path_points", "calibration_examples")  # fields of a recipe, where other changes are settings


class Search(NamedTuple):
    """rates: learning rates of every method; seeds: of no final run; scaling: of the update, None for the usual one"""

    tasks: Sequence[str]
    rank: float
    conditions: dict
    rates: dict[str, Sequence[float]]
    seeds: Sequence[int] = (SEARCH_SEED,)
    scaling: float | None = None


SEARCHES = (
    Search(SEARCH_TASKS, 2, {}, {"lora": RATES, "cobra": RATES, "adalora": (*RATES, 1.6e-2), "paper": RATES}),
    Search(REGRESSIONS[:1], 2, {}, {"lora": (*RATES[1:], 1.6e-2), "cobra": RATES[1:], "adalora": (*RATES[1:], 1.6e-2, 3.2e-2)}),
    # alpha halved and doubled, at rates that move against it
    Search(
        REGRESSIONS[:1],
        2,
        {},
        {"lora": (8e-3, 1.6e-2, 3.2e-2), "cobra": (4e-3, 8e-3, 1.6e-2), "adalora": (1.6e-2, 3.2e-2, 6.4e-2)},
        scaling=1.0,
    ),
    Search(REGRESSIONS[:1], 2, {}, {"lora": RATES[2:], "cobra": RATES[1:4], "adalora": (*RATES[3:], 1.6e-2)}, scaling=4.0),
    # rank 8 has a search of its own: the best rates of rank 2 are too high there
    Search(REGRESSIONS[:1], 8, {}, {"lora": RATES[1:], "cobra": RATES[1:], "adalora": (*RATES[1:], 1.6e-2, 3.2e-2)}),
    Search(SEARCH_TASKS, 8, {}, {"lora": RATES[1:4], "cobra": RATES[:4], "adalora": (*RATES[1:], 1.6e-2)}),
    Search(SEARCH_TASKS, 2, {}, {"full": (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4)}),
    Search(SEARCH_TASKS, 2, {}, {"singular": RATES[1:4]}),
    Search(REGRESSIONS[:1], 2, {}, {"singular": RATES[1:]}),
    Search(REGRESSIONS[:1], 8, {}, {"singular": RATES[:3]}),
    # after few steps rates of one seed differ by less than its noise
    Search(
        SEARCH_TASKS,
        2,
        SHORT,
        {"cobra": RATES[1:], "lora": RATES[1:], "singular": RATES[1:4], "adalora": (*RATES[1:], 1.6e-2)},
        seeds=(SEARCH_SEED, SEARCH_SEED + 1, SEARCH_SEED + 2),
    ),
    Search(SEARCH_TASKS, 2, {}, dict.fromkeys(VARIANTS, RATES[1:])),
    Search(REGRESSIONS[:1], 2, LONG, {"lora": RATES[2:], "cobra": RATES[1:]}),
    Search(
        LANGUAGE[:1],
        2,
        {},
        {method: (*RATES[3:], 1.6e-2) for method in PEERS[:2]} | {"adalora": (*RATES[3:], 1.6e-2, 3.2e-2, 6.4e-2)},
    ),
    Search(
        SEARCH_TASKS,
        TIGHT,
        {},
        {"cobra": RATES[1:], "lora": (*RATES[2:], 1.6e-2), "singular": RATES[1:4], "cobra+singular": RATES[2:]},
    ),
    Search(LONG_TEXTS[:1], 2, LONGER, {"lora": RATES[2:], "cobra": RATES[1:]}),
    Search(SEARCH_TASKS, 2, FEW, {"lora": RATES[1:4], "cobra": RATES[1:]}),
    Search(REGRESSIONS[:1], 2, FEW, {"lora": (*RATES[2:], 1.6e-2), "cobra": RATES[2:], "singular": RATES[1:]}),
    Search(SEARCH_TASKS, 2, NOISY, {"lora": (6.25e-5, 1.25e-4, 2.5e-4, *RATES[:4]), "cobra": (1.25e-4, 2.5e-4, *RATES)}),
    Search(SEARCH_TASKS, 32, {}, {"lora": RATES[1:4], "cobra": RATES[:3]}),
    Search(REGRESSIONS[:1], 32, {}, dict.fromkeys(PEERS[:2], RATES[:4])),
    Search(REGRESSIONS[:1], 2, LARGER, dict.fromkeys(PEERS[:2], RATES[1:])),
)


def search() -> Iterator[Recipe]:
    """Learning rates on validation, doubled on both sides of the best; a method is not tested before they get worse on both."""
    for study in SEARCHES:
        yield from _runs(study)


def factor() -> Iterator[Recipe]:
    """One factor at a time on validation: from `FACTOR_REFERENCE`, beside LoRA, on classification; from COBRA's form, on
    regressions."""
    for seed in (SEARCH_SEED, SEARCH_SEED + 1):
        for task in FACTOR_TASKS:
            yield _recipe("factor", task, "lora", 2, FACTOR_RATE, None, seed)
        for change in FACTORS:
            for task in FACTOR_TASKS:
                settings = tuple({**FACTOR_REFERENCE, **change}.items())
                yield Recipe("factor", task, "cobra", 2, FACTOR_RATE, seed, settings=settings)
    if best := _rates(read_rows(), "regression", 2, {}).get("cobra"):
        for change, task in product(WIDE_PARTS, REGRESSIONS):
            yield _changed("factor", task, "cobra", 2, best, SEARCH_SEED, COBRA, change)


def ablation() -> Iterator[Recipe]:
    """On validation: COBRA's form without its parts, on regressions, in a short training and at a ninth of the parameters; the
    published form with and without each of them, on classification; the singular one with other widths, cuts and starts."""
    seeds, rows = range(SEARCH_SEED, SEARCH_SEED + 3), read_rows()
    studies = (
        (REGRESSIONS, 2, {}, "singular", SINGULAR, SINGULAR_PARTS),
        (REGRESSIONS, 2, {}, "cobra", COBRA, REGRESSION_PARTS),
        (FACTOR_TASKS, 2, {}, "paper", PAPER, PUBLISHED_PARTS),
        (FACTOR_TASKS, 2, SHORT, "cobra", COBRA, SHORT_PARTS),
        (FACTOR_TASKS, TIGHT, {}, "cobra", FEW_LAYERS["cobra"], TIGHT_PARTS),
    )
    for tasks, rank, conditions, searched, form, changes in studies:
        method = "singular" if searched == "singular" else "cobra"  # which is the published form too, by its settings
        # below rank 1 at rank 2's rate, half of what a search there found later
        if best := _rates(rows, kind_of(tasks[0]), max(rank, 2), conditions).get(searched):
            for seed, change, task in product(seeds, changes, tasks):
                yield _changed("ablation", task, method, rank, best, seed, form, change, **conditions)


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
        (TASKS, 2, SHORT, PEERS, few),
        (TASKS, 2, {}, VARIANTS, few),
        (TASKS, 2, {}, ("paper",), few),
        (LANGUAGE[:1], 2, {}, PEERS[:2], few),
        (TASKS, 2, SHORT, ("singular",), few),
        (TASKS, TIGHT, {}, ("cobra", "lora", "singular", "cobra+singular"), few),
        (GLUE, 2, FEW, PEERS[:2], few),
        ((*REGRESSIONS, *GRADED), 2, FEW, (*PEERS[:2], "singular"), few),
        (REGRESSIONS, 32, {}, PEERS[:2], few),
        (REGRESSIONS, 2, {}, ("random", "plan"), few),
        (REGRESSIONS, 2, LONG, PEERS[:2], few),
        (TASKS, TIGHT, {}, ("random",), few),
        (LANGUAGE[1:], 2, {}, PEERS[:2], few),
        (LONG_TEXTS, 2, LONGER, PEERS[:2], few),
        (LANGUAGE[:1], 2, {}, PEERS[2:], few),
        (SEARCH_TASKS, 2, NOISY, PEERS[:2], few),
        (TASKS, 32, {}, PEERS[:2], few),
        (REGRESSIONS, 2, LARGER, PEERS[:2], few),
        (LANGUAGE[1:], 2, {}, PEERS[2:], few),
    )
    for tasks, rank, conditions, methods, seeds in cells:
        chosen = _chosen(rows, kind_of(tasks[0]), rank, conditions)
        for seed, task, method in product(seeds, tasks, methods):
            if found := chosen.get(LIKE.get(method, method)):
                yield _recipe("final", task, method, rank, *found, seed, **conditions)


class Chosen(NamedTuple):
    lr: float
    scaling: float | None


def _chosen(
    rows: list[dict], kind: str, rank: float, conditions: dict, studies: Sequence[Search] = SEARCHES
) -> dict[str, Chosen]:
    """Method -> learning rate and scaling with the best mean over the tasks that were searched, of methods whose search is
    finished: every planned run has its row, and the best rate is neither the lowest nor the highest that was tried with that
    scaling, beyond which a better one may lie."""
    here = [s for s in studies if (kind_of(s.tasks[0]), s.rank, s.conditions) == (kind, rank, conditions)]
    methods = dict.fromkeys(method for study in here for method in study.rates)
    planned = {method: [recipe for study in here for recipe in _runs(study, method)] for method in methods}
    found, chosen = {row["key"]: row for row in rows}, {}
    for method, recipes in planned.items():
        if all(recipe.key in found for recipe in recipes):
            (config,) = select_best([found[recipe.key] for recipe in recipes], "over tasks").values()
            best = Chosen(config["lr"], config["settings"].get("scaling"))
            tried = [recipe.lr for recipe in recipes if recipe.options.get("scaling") == best.scaling]
            if min(tried) < best.lr < max(tried):
                chosen[method] = best
    return chosen


def _rates(rows: list[dict], kind: str, rank: float, conditions: dict) -> dict[str, float]:
    """Method -> learning rate at the usual scaling, which studies on validation have."""
    usual = [study for study in SEARCHES if study.scaling is None]
    return {method: found.lr for method, found in _chosen(rows, kind, rank, conditions, usual).items()}


def _runs(study: Search, *methods: str) -> Iterator[Recipe]:
    """Of these methods of a search, or of all."""
    for seed, method in product(study.seeds, methods or study.rates):
        for task, rate in product(study.tasks, study.rates.get(method, ())):
            yield _recipe("search", task, method, study.rank, rate, study.scaling, seed, **study.conditions)


def _recipe(
    phase: str, task: str, method: str, rank: float, rate: float, scaling: float | None, seed: int, **conditions: object
) -> Recipe:
    settings = (FEW_LAYERS if rank == TIGHT else SETTINGS).get(method, {})
    settings = settings if scaling is None else {**settings, "scaling": scaling}
    common = {"settings": tuple(settings.items())} | (TEXTS if task in LANGUAGE else {}) | conditions
    return Recipe(phase, task, method, rank, rate, seed, **common)


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
