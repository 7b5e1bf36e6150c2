"""Learning rates: searched alike, and chosen where a search is finished and not at its end."""

from itertools import pairwise

from accuracy_searches import BEST, searched, study, tried

from bench.accuracy import rows
from bench.accuracy.cells import METRIC, condition_of
from bench.accuracy.recipe import Recipe
from bench.accuracy.searches import LONG, PEERS, RATES, REGRESSIONS, chosen, rates_of, search
from bench.accuracy.statistics import Choice

USUAL = ("minilm", 200, 2000, 0.0, 64)


def test_methods_are_searched_alike():
    """Rates double, on the same tasks, and all peers have the middle ones of a study."""
    for (*of, _), rates in tried().items():
        ordered = sorted(rates)
        assert all(high == 2 * low for low, high in pairwise(ordered))
        peers = [tried().get((*of, method), set()) for method in PEERS]
        assert len(set.intersection(*filter(None, peers))) > 1
    for method in (*PEERS, "paper"):
        assert tried()["classification", 2, USUAL, method] >= set(RATES)


def test_no_run_is_searched_twice():
    keys = [recipe.key for recipe in search()]
    assert len(set(keys)) == len(keys)


def test_every_finished_search_has_its_choice():
    """Named as tables name it."""
    found = chosen(searched())
    assert found[Choice("minilm", None, "cobra", 2)] == BEST["classification", 2, USUAL, "cobra"]
    short = ("minilm", 50, 2000, 0.0, 64)
    assert found[Choice("minilm", None, "lora", 2, "steps 50")] == BEST["classification", 2, short, "lora"]
    assert found[Choice("minilm", "regression", "adalora", 8)] == BEST["regression", 8, USUAL, "adalora"]
    assert len(found) == len(BEST)


def test_the_last_search_decides():
    """Of rates that one run of one task preferred, where others were tried on more."""
    found = searched()
    for row in found:
        recipe = Recipe.from_dict(row["config"])
        if study(recipe) == ("regression", 2, USUAL, "lora"):
            early = recipe.task == REGRESSIONS[0] and recipe.seed == 100
            row["validation"] = {METRIC["regression"]: 0.5 if recipe.lr == (8e-3 if early else 4e-3) else 0.6}
    assert rates_of(found, "regression", 2, {})["lora"] == 4e-3


def test_a_method_without_a_finished_search_has_no_rate():
    """Neither where a run is missing of the search that decides, nor of an earlier one."""
    whole = searched()
    others = rates_of(whole, "regression", 2, {}).keys() - {"lora"}
    for task, seed, lr in (("amazon", 102, 8e-3), ("tweets", 100, 1.6e-2)):
        left = [
            row
            for row in whole
            if (row["task"], row["seed"], row["config"]["lr"], row["method"], row["average_rank"], row["model"])
            != (task, seed, lr, "lora", 2, "minilm")
        ]
        assert len(left) < len(whole)
        assert rates_of(left, "regression", 2, {}).keys() == others


def test_a_search_that_is_best_where_it_ends_has_no_rate():
    """Lower or higher rates must be tried before there is a test."""
    of = "regression", 2, ("minilm", 600, 2000, 0.0, 64)
    for end in (min, max):
        found = searched()
        for row in found:
            recipe = Recipe.from_dict(row["config"])
            if study(recipe) == (*of, "cobra+long") and recipe.lr == end(tried()[(*of, "cobra+long")]):
                row["validation"] = {METRIC["regression"]: 0.1}
        assert rates_of(found, "regression", 2, LONG).keys() == {"lora", "cobra"}


def test_committed_results_are_at_the_rates_that_were_chosen():
    """None is at a rate where its search ended, or at one that a later search replaced."""
    committed = rows.read_rows()
    rates, found = tried(), chosen(committed)
    for row in committed:
        if row["phase"] == "final":
            recipe = Recipe.from_dict(row["config"])
            *_, method = study(recipe)
            assert min(rates[study(recipe)]) < recipe.lr < max(rates[study(recipe)]), row["key"]
            where = row["average_rank"], condition_of(row)
            kind = None if row["kind"] == "classification" else row["kind"]
            choice = Choice(row["model"], kind, method, *where)
            assert found[choice] == recipe.lr, row["key"]
