"""Rows of searches that are finished, in which the second rate of the search that decides is the best."""

from collections import defaultdict
from functools import cache

from bench.accuracy.cells import METRIC, higher_is_better
from bench.accuracy.grid import LIKE
from bench.accuracy.recipe import Recipe
from bench.accuracy.searches import SEARCHES, runs_of, search
from bench.accuracy.tasks import kind_of


def study(recipe: Recipe) -> tuple:
    """What a rate is searched for; controls take another method's."""
    conditions = recipe.model, recipe.steps, recipe.examples, recipe.noise, recipe.max_length
    return kind_of(recipe.task), recipe.average_rank, conditions, LIKE.get(recipe.method, recipe.method)


@cache
def tried() -> dict[tuple, set[float]]:
    found = defaultdict(set)
    for recipe in search():
        found[study(recipe)].add(recipe.lr)
    return found


BEST = {
    study(next(runs_of(each, method))): sorted(rates)[1] for each in SEARCHES for method, rates in each.rates.items()
}  # later ones decide


def searched() -> list[dict]:
    return [
        {
            **{name: recipe.to_dict()[name] for name in ("phase", "task", "model", "method", "average_rank", "seed")},
            "key": recipe.key,
            "kind": kind_of(recipe.task),
            "config": recipe.to_dict(),
            "validation": _validation(kind_of(recipe.task), recipe.lr == BEST[study(recipe)]),
            "test": None,
        }
        for recipe in search()
    ]


def _validation(kind: str, best: bool) -> dict[str, float]:
    return {METRIC[kind]: 0.8 if best == higher_is_better(kind) else 0.7}
