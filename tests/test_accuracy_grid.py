"""Which runs there are, and that each is run once: by one process, and never again once its row is there."""

from collections import defaultdict
from functools import partial
from itertools import pairwise

import pytest
from accuracy_models import reviews, tiny

from bench.accuracy import grid, rows
from bench.accuracy import run as runs
from bench.accuracy.cells import METRIC, higher_is_better
from bench.accuracy.methods import METHODS
from bench.accuracy.recipe import PHASES, Recipe
from bench.accuracy.tasks import kind_of


def study(recipe: Recipe) -> tuple:
    """What a rate is searched for; controls take another method's."""
    conditions = recipe.model, recipe.steps, recipe.examples, recipe.noise, recipe.max_length
    return kind_of(recipe.task), recipe.average_rank, conditions, grid.LIKE.get(recipe.method, recipe.method)


def with_scaling(recipe: Recipe) -> tuple:
    return *study(recipe), recipe.options.get("scaling")


def tried() -> dict[tuple, set[float]]:
    found = defaultdict(set)
    for recipe in grid.search():
        found[with_scaling(recipe)].add(recipe.lr)
    return found


BEST = {of: sorted(rates)[1] for of, rates in tried().items()}  # with the usual scaling


def searched(scaling: float | None = None) -> list[dict]:
    """Rows of a finished search in which every method's second rate is the best, with this scaling where it was tried."""
    where = {study(recipe): scaling for recipe in grid.search() if recipe.options.get("scaling") == scaling}
    return [
        {
            **{name: recipe.to_dict()[name] for name in ("phase", "task", "model", "method", "average_rank", "seed")},
            "key": recipe.key,
            "kind": kind_of(recipe.task),
            "config": recipe.to_dict(),
            "validation": _validation(
                kind_of(recipe.task),
                recipe.lr == BEST[with_scaling(recipe)] and recipe.options.get("scaling") == where.get(study(recipe)),
            ),
            "test": None,
        }
        for recipe in grid.search()
    ]


def _validation(kind: str, best: bool) -> dict[str, float]:
    return {METRIC[kind]: 0.8 if best == higher_is_better(kind) else 0.7}


@pytest.fixture
def finals(monkeypatch):
    monkeypatch.setattr(grid, "read_rows", searched)
    return list(grid.final())


def test_final_runs_share_no_sample_with_the_search(finals):
    """Settings were chosen on seeds of which no final run is."""
    chosen_on = {recipe.seed for phase in (grid.search, grid.factor, grid.ablation) for recipe in phase()}
    assert grid.SEARCH_SEED in chosen_on
    assert finals and not chosen_on & {recipe.seed for recipe in finals}


def test_every_run_is_planned_once(finals):
    planned = [*grid.search(), *grid.factor(), *grid.ablation(), *finals]
    assert len({recipe.key for recipe in planned}) == len(planned)
    assert {recipe.phase for recipe in planned} == set(PHASES)
    assert {recipe.method for recipe in planned} <= set(METHODS)


def test_a_sweep_changes_settings_the_calibration_or_the_rate(monkeypatch):
    """From COBRA's form on regressions, at the rate of its search; what a calibration measures is no setting of the adapter."""
    monkeypatch.setattr(grid, "read_rows", searched)
    swept = [recipe for recipe in grid.factor() if recipe.task in grid.REGRESSIONS]
    reference = next(recipe for recipe in swept if recipe.options == grid.COBRA)
    assert {recipe.estimator for recipe in swept} == {"paper", "conductance", "direct"}
    assert {recipe.path_points for recipe in swept} == {2, reference.path_points}
    assert not any(set(recipe.options) & {*grid.CALIBRATION, "lr"} for recipe in swept)
    halved = [recipe for recipe in swept if recipe.lr == reference.lr / 2]
    assert halved and all(recipe.options["lora_B_lr_scale"] == 4.0 for recipe in halved)


def test_methods_are_searched_alike():
    """Rates double, on the same tasks, and all peers have the middle ones of a study."""
    for (*of, _, scaling), rates in tried().items():
        ordered = sorted(rates)
        assert all(high == 2 * low for low, high in pairwise(ordered))
        peers = [tried().get((*of, method, scaling), set()) for method in grid.PEERS]
        if scaling is None:
            assert len(set.intersection(*filter(None, peers))) > 1
        else:  # around what was best with the usual one
            assert [len(rates) for rates in peers] == [3, 3, 3]
    for method in grid.METHODS:
        assert tried()["classification", 2, ("minilm", 200, 2000, 0.0, 64), method, None] >= set(grid.RATES)


def test_no_committed_result_is_at_a_rate_where_its_search_ended():
    """Then a better one may lie beyond."""
    rates = tried()
    for row in rows.read_rows():
        if row["phase"] == "final":
            recipe = Recipe.from_dict(row["config"])
            assert min(rates[with_scaling(recipe)]) < recipe.lr < max(rates[with_scaling(recipe)]), row["key"]


def test_methods_are_tested_alike(finals):
    """At the rate that the search found for kind, rank and conditions, in the form that was searched, in the same cells."""
    forms = {(study(recipe), recipe.settings) for recipe in grid.search()}
    cells = defaultdict(set)
    for recipe in finals:
        assert recipe.lr == BEST[with_scaling(recipe)]
        assert recipe.method in grid.LIKE or (study(recipe), recipe.settings) in forms
        conditions = recipe.steps, recipe.examples, recipe.noise, recipe.max_length
        cells[recipe.method].add((recipe.model, recipe.task, recipe.average_rank, conditions, recipe.seed))
    for method, found in cells.items():
        assert found <= cells["lora"], method
    assert cells["cobra"] == cells["lora"]
    usual = [(200, 2000, 0.0, 64), (50, 2000, 0.0, 64), (60, 1000, 0.0, 128)]
    everywhere = {cell for cell in cells["lora"] if cell[0] != "mpnet" and cell[2] in (2, 8) and cell[3] in usual}
    assert cells["adalora"] == everywhere


@pytest.mark.parametrize("scaling", [1.0, 4.0])
def test_a_scaling_that_is_better_is_tested(monkeypatch, scaling):
    """At its own best rate, by controls too; studies on validation stay at the usual one."""
    monkeypatch.setattr(grid, "read_rows", lambda: searched(scaling))
    of = "regression", 2, ("minilm", 200, 2000, 0.0, 64)
    found = [recipe for recipe in grid.final() if study(recipe)[:3] == of and recipe.method in (*grid.PEERS, "random", "plan")]
    assert {recipe.method for recipe in found} == {*grid.PEERS, "random", "plan"}
    assert all(recipe.options["scaling"] == scaling and recipe.lr == BEST[with_scaling(recipe)] for recipe in found)
    elsewhere = [recipe for recipe in grid.final() if study(recipe)[:3] != of]
    assert elsewhere and not any("scaling" in recipe.options for recipe in elsewhere)
    assert not any("scaling" in recipe.options for recipe in (*grid.factor(), *grid.ablation()))


def test_a_method_without_a_finished_search_is_not_tested(monkeypatch):
    rows = searched()
    last = next(row for row in reversed(rows) if row["method"] == "cobra" and row["kind"] == "regression")
    monkeypatch.setattr(grid, "read_rows", lambda: [row for row in rows if row is not last])
    left = {(kind_of(recipe.task), recipe.method, recipe.model) for recipe in grid.final()}
    assert ("regression", "cobra", last["model"]) not in left
    assert {("classification", "cobra", "minilm"), ("regression", "lora", "mpnet"), ("language", "cobra", "smollm2")} <= left


def test_a_search_that_is_best_where_it_ends_is_not_finished(monkeypatch):
    """Lower or higher rates must be tried before there is a test."""
    of = "regression", 32, ("minilm", 200, 2000, 0.0, 64)
    for end in (min, max):
        rows = searched()
        for row in rows:
            recipe = Recipe.from_dict(row["config"])
            if study(recipe) == (*of, "cobra") and recipe.lr == end(tried()[(*of, "cobra", None)]):
                row["validation"] = {METRIC["regression"]: 0.1}
        monkeypatch.setattr(grid, "read_rows", lambda rows=rows: rows)
        assert {recipe.method for recipe in grid.final() if study(recipe)[:3] == of} == {"lora"}


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """The grid at work in folders of its own, on two tiny searches of which one diverges."""
    for name, folder in (("read_rows", "rows"), ("append_row", "rows"), ("claim", "claims")):
        monkeypatch.setattr(grid, name, partial(getattr(rows, name), folder=tmp_path / folder))
    planned = [tiny("lora"), tiny("lora", lr=1e30)]
    monkeypatch.setattr(grid, "search", lambda: planned)
    monkeypatch.setattr(runs, "_task", lambda name, data: reviews())
    yield planned
    runs._start.cache_clear()


def test_runs_are_stored_once_and_divergence_with_them(folders, monkeypatch, capsys):
    grid.work("search", minutes=5, data=None)
    good, bad = grid.read_rows()
    assert good["key"] == folders[0].key and good["validation"]["accuracy"] > 0
    assert bad.pop("diverged").startswith("lora on rt, lr 1e+30: the loss of step 2 is ")
    found = {"phase": "search", "kind": "classification", "config": folders[1].to_dict()}
    assert bad == {"key": folders[1].key, **found}
    assert "2 of 2 rows of phase search are there" in capsys.readouterr().out
    monkeypatch.setattr(grid, "run", lambda recipe, data: pytest.fail(f"{recipe.key} ran again"))
    grid.work("search", minutes=5, data=None)
    assert len(grid.read_rows()) == 2


def test_what_another_process_is_at_is_left_to_it(folders, capsys):
    with grid.claim(folders[0].key):
        grid.work("search", minutes=5, data=None)
    assert [row["key"] for row in grid.read_rows()] == [folders[1].key]
    assert "1 of 2 rows" in capsys.readouterr().out


def test_no_run_starts_after_its_time(folders):
    grid.work("search", minutes=-1, data=None)
    assert grid.read_rows() == []
