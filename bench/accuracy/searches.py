"""Which learning rates were searched for which methods, and what was chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from bench.accuracy.cells import condition_of
from bench.accuracy.forms import FEW_LAYERS, MEASURED, SETTINGS, TIGHT
from bench.accuracy.recipe import TEXTS, Recipe
from bench.accuracy.statistics import Choice, select_best
from bench.accuracy.tasks import kind_of

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
PEERS = ("lora", "cobra+long", "adalora")
HEADLINE = ("lora", "cobra+long", "cobra")  # run in all conditions
VARIANTS = ("rslora", "dora", "eva")
SEARCH_SEEDS = (100, 101, 102)  # of no final run
SEARCH_SEED = SEARCH_SEEDS[0]
TASKS = ("supersense", "rt", "crowd", "kotz", "trec")
SEARCH_TASKS = ("supersense", "rt", "trec")
REGRESSIONS = ("tweets", "amazon")
LANGUAGE = ("gcide", "gsm8k")
LONG_TEXTS = ("hyper", "foods")
GLUE = ("sst2", "cola", "mrpc", "rte")
GRADED = ("stsb", "fiqa")
SHORT = {"steps": 50}
LONG = {"steps": 600}
# what plain LoRA does in the time of 200 steps of COBRA at rank 2, with the whole calibration or a quarter of it
WHOLE, QUARTER = {"steps": 332}, {"steps": 228}
SAME_TIME = {"cobra+long": WHOLE, "cobra+long+quick": QUARTER, "cobra": WHOLE, "cobra+quick": QUARTER}
FEW = {"examples": 500}
MORE = {"examples": 4000}
NOISY = {"noise": 0.3}
LARGER = {"model": "mpnet"}
LONGER = {"max_length": 128}


class Search(NamedTuple):
    """rates: learning rates of every method; seeds: of no final run. Of several searches for one method under the same
    conditions the last one decides."""

    tasks: Sequence[str]
    rank: float
    conditions: dict
    rates: dict[str, Sequence[float]]
    seeds: Sequence[int] = (SEARCH_SEED,)


SEARCHES = (
    Search(SEARCH_TASKS, 2, {}, {"lora": RATES, "cobra+long": RATES, "adalora": (*RATES, 1.6e-2), "paper": RATES}),
    Search(
        REGRESSIONS[:1], 2, {}, {"lora": (*RATES[1:], 1.6e-2), "cobra+long": RATES[1:], "adalora": (*RATES[1:], 1.6e-2, 3.2e-2)}
    ),
    # rank 8 has a search of its own: the best rates of rank 2 are too high there
    Search(REGRESSIONS[:1], 8, {}, {"lora": RATES[1:], "cobra+long": RATES[1:], "adalora": (*RATES[1:], 1.6e-2, 3.2e-2)}),
    Search(SEARCH_TASKS, 8, {}, {"lora": RATES[1:4], "cobra+long": RATES[:4], "adalora": (*RATES[1:], 1.6e-2)}),
    Search(SEARCH_TASKS, 2, {}, {"full": (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4)}),
    Search(SEARCH_TASKS, 2, {}, {"singular": RATES[1:4]}),
    Search(REGRESSIONS[:1], 2, {}, {"singular": RATES[1:]}),
    Search(REGRESSIONS[:1], 8, {}, {"singular": RATES[:3]}),
    # one run of tweets told LoRA's 4e-3 and 8e-3 apart by 2 %, and took what amazon is worse at
    Search(
        REGRESSIONS,
        2,
        {},
        dict.fromkeys(PEERS[:2], RATES[2:]) | {"singular": RATES[1:], "adalora": (8e-3, 1.6e-2, 3.2e-2)},
        seeds=SEARCH_SEEDS,
    ),
    Search(
        REGRESSIONS,
        8,
        {},
        {"lora": RATES[1:], "cobra+long": RATES[1:4], "singular": RATES[:3], "adalora": (*RATES[3:], 1.6e-2, 3.2e-2)},
        seeds=SEARCH_SEEDS,
    ),
    # LoRA+: of lora_A, that of lora_B is 16 times as high
    Search(REGRESSIONS, 2, {}, {"loraplus": RATES[:3]}),
    # after few steps rates of one seed differ by less than its noise
    Search(
        SEARCH_TASKS,
        2,
        SHORT,
        {"cobra+long": RATES[1:], "lora": RATES[1:], "singular": RATES[1:4], "adalora": (*RATES[1:], 1.6e-2)},
        seeds=SEARCH_SEEDS,
    ),
    Search(SEARCH_TASKS, 2, SHORT, {"cobra": RATES[1:]}, seeds=SEARCH_SEEDS),
    Search(REGRESSIONS, 2, {}, {"cobra": (*RATES[2:], 1.6e-2)}, seeds=SEARCH_SEEDS),
    Search(SEARCH_TASKS, 2, {}, {"cobra": RATES[1:]}),
    Search(REGRESSIONS, 8, {}, {"cobra": RATES[1:]}, seeds=SEARCH_SEEDS),
    Search(SEARCH_TASKS, 8, {}, {"cobra": RATES[1:]}),
    Search(REGRESSIONS[:1], 2, FEW, {"cobra": (*RATES[2:], 1.6e-2)}),
    Search(SEARCH_TASKS, 2, FEW, {"cobra": RATES[1:]}),
    Search(SEARCH_TASKS, 2, NOISY, {"cobra": (1.25e-4, 2.5e-4, *RATES)}),
    Search(SEARCH_TASKS, 32, {}, {"cobra": RATES[:4]}),
    Search(SEARCH_TASKS, 2, {}, dict.fromkeys(VARIANTS, RATES[1:])),
    Search(REGRESSIONS, 2, WHOLE, {"lora": RATES[2:]}),
    Search(REGRESSIONS, 2, QUARTER, {"lora": RATES[2:]}),
    Search(GRADED[:1], 2, MORE, dict.fromkeys(PEERS[:2], RATES[1:]) | {"cobra": RATES[2:]}),
    Search(REGRESSIONS[:1], 2, LONG, {"lora": RATES[2:], "cobra": RATES[2:], "cobra+long": RATES[1:]}),
    Search(
        LANGUAGE[:1],
        2,
        {},
        dict.fromkeys(HEADLINE, (*RATES[3:], 1.6e-2)) | {"adalora": (*RATES[3:], 1.6e-2, 3.2e-2, 6.4e-2)},
    ),
    Search(
        SEARCH_TASKS,
        TIGHT,
        {},
        {"cobra+long": RATES[1:], "lora": (*RATES[2:], 1.6e-2), "singular": RATES[1:4], "cobra+singular": RATES[2:]},
    ),
    Search(LONG_TEXTS[:1], 2, LONGER, {"lora": RATES[2:], "cobra": RATES[2:], "cobra+long": RATES[1:]}),
    Search(SEARCH_TASKS, 2, FEW, {"lora": RATES[1:4], "cobra+long": RATES[1:]}),
    Search(REGRESSIONS[:1], 2, FEW, {"lora": (*RATES[2:], 1.6e-2), "cobra+long": RATES[2:], "singular": RATES[1:]}),
    # here too one run of tweets preferred rates at which others collapse
    Search(
        REGRESSIONS,
        2,
        FEW,
        {"lora": (*RATES[2:], 1.6e-2), "cobra+long": RATES[2:], "cobra": (*RATES[2:], 1.6e-2)},
        seeds=SEARCH_SEEDS,
    ),
    Search(SEARCH_TASKS, 2, NOISY, {"lora": (6.25e-5, 1.25e-4, 2.5e-4, *RATES[:4]), "cobra+long": (1.25e-4, 2.5e-4, *RATES)}),
    Search(SEARCH_TASKS, 32, {}, {"lora": RATES[:4], "cobra+long": (2.5e-4, *RATES[:3])}),
    Search(REGRESSIONS[:1], 32, {}, dict.fromkeys(HEADLINE, RATES[:4])),
    # and here: at the rate that one run preferred, others of COBRA's form go badly
    Search(REGRESSIONS, 32, {}, dict.fromkeys(("lora", "cobra"), RATES[:4]), seeds=SEARCH_SEEDS),
    Search(REGRESSIONS[:1], 2, LARGER, dict.fromkeys(HEADLINE, RATES[1:])),
)


def search() -> Iterator[Recipe]:
    """Learning rates on validation, doubled on both sides of the best; a method is not tested before they get worse on both."""
    yield from {recipe.key: recipe for study in SEARCHES for recipe in runs_of(study)}.values()


def rates_of(rows: Sequence[dict], kind: str, rank: float, conditions: dict) -> dict[str, float]:
    """Method -> learning rate with the best mean over the tasks of the search that decides.

    Only of methods whose searches are finished: every planned run has its row, and the best is neither the lowest nor the
    highest rate that was tried, beyond which a better one may lie.
    """
    found, rates = {row["key"]: row for row in rows}, {}
    here = [s for s in SEARCHES if (kind_of(s.tasks[0]), s.rank, s.conditions) == (kind, rank, conditions)]
    for method in dict.fromkeys(method for study in here for method in study.rates):
        *earlier, deciding = [list(runs_of(study, method)) for study in here if method in study.rates]
        planned = [recipe for runs in (*earlier, deciding) for recipe in runs]
        if all(recipe.key in found for recipe in planned):
            (best,) = select_best([found[recipe.key] for recipe in deciding], "over tasks").values()
            tried = [recipe.lr for recipe in deciding]
            if min(tried) < best["lr"] < max(tried):
                rates[method] = best["lr"]
    return rates


def chosen(rows: Sequence[dict]) -> dict[Choice, float]:
    """The rates that runs on test take, by what they were chosen for."""
    found = {}
    for study in SEARCHES:
        sample, kind = next(runs_of(study)), kind_of(study.tasks[0])
        where = study.rank, condition_of({"kind": kind, "config": sample.to_dict()})
        for method, rate in rates_of(rows, kind, study.rank, study.conditions).items():
            found[Choice(sample.model, None if kind == "classification" else kind, method, *where)] = rate
    return found


def runs_of(study: Search, *methods: str) -> Iterator[Recipe]:
    """Of these methods of a search, or of all."""
    tasks, rank, conditions, rates, seeds = study
    for seed, method in product(seeds, methods or rates):
        for task, rate in product(tasks, rates[method]):
            yield recipe_for("search", task, method, rank, rate, seed, **conditions)


def recipe_for(phase: str, task: str, method: str, rank: float, rate: float, seed: int, **conditions: object) -> Recipe:
    """In the method's form at this rank, with the sizes of the task's kind."""
    settings = (FEW_LAYERS if rank == TIGHT else SETTINGS).get(method, {})
    fields = (TEXTS if task in LANGUAGE else {}) | MEASURED.get(method, {}) | conditions
    common = {"settings": tuple(settings.items())} | fields
    return Recipe(phase, task, method, rank, rate, seed, **common)
