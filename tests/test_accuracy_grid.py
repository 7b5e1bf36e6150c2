"""Which runs there are, and that each is run once: by one process, and never again once its row is there."""

from functools import partial
from itertools import cycle

import pytest
from accuracy_models import reviews, tiny

from bench.accuracy import grid, rows
from bench.accuracy import run as runs
from bench.accuracy.cells import METRIC, higher_is_better
from bench.accuracy.methods import METHODS
from bench.accuracy.recipe import PHASES
from bench.accuracy.tasks import kind_of


def searched(best: dict[str, float]) -> list[dict]:
    """Rows of a finished search in which every method has its best rate."""
    return [
        {
            **{name: recipe.to_dict()[name] for name in ("phase", "task", "model", "method", "average_rank", "seed")},
            "key": recipe.key,
            "kind": kind_of(recipe.task),
            "config": recipe.to_dict(),
            "validation": _validation(kind_of(recipe.task), recipe.lr == best[recipe.method]),
            "test": None,
        }
        for recipe in grid.search()
    ]


def _validation(kind: str, best: bool) -> dict[str, float]:
    return {METRIC[kind]: 0.8 if best == higher_is_better(kind) else 0.7}


BEST = dict(zip(grid.METHODS, cycle(grid.RATES), strict=False))


@pytest.fixture
def finals(monkeypatch):
    monkeypatch.setattr(grid, "read_rows", lambda: searched(BEST))
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


def test_methods_are_searched_and_tested_alike(finals):
    """At least the same rates on the same tasks; the same cells for all peers; the rate that the search found for the kind."""
    wide = [recipe for recipe in finals if recipe.average_rank != grid.TIGHT]
    for method in grid.METHODS:
        tried = {(recipe.task, recipe.lr) for recipe in grid.search() if recipe.method == method}
        assert tried >= {(task, rate) for task in grid.SEARCH_TASKS for rate in grid.RATES}
        mine = [recipe for recipe in wide if recipe.method == method]
        assert {recipe.lr for recipe in mine if kind_of(recipe.task) == "classification"} == {BEST[method]}
        assert {recipe.settings for recipe in mine} == {r.settings for r in grid.search() if r.method == method}
    cells = [{(recipe.task, recipe.average_rank, recipe.seed) for recipe in wide if recipe.method == m} for m in grid.PEERS]
    assert all(found == cells[0] for found in cells)


def test_a_kind_without_a_finished_search_is_not_tested_at_another_kinds_rate(monkeypatch):
    only = [row for row in searched(BEST) if row["kind"] == "classification"]
    monkeypatch.setattr(grid, "read_rows", lambda: only)
    assert {kind_of(recipe.task) for recipe in grid.final()} == {"classification"}


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
