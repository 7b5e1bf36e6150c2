"""Which runs there are, and that each is run once: by one process, and never again once its row is there."""

from functools import partial
from itertools import cycle

import pytest
from accuracy_models import reviews, tiny

from bench.accuracy import grid, rows
from bench.accuracy import run as runs
from bench.accuracy.methods import METHODS


def searched(best: dict[str, float]) -> list[dict]:
    """Rows of a finished search in which every method has its best rate."""
    return [
        {
            **{name: recipe.to_dict()[name] for name in ("phase", "task", "model", "method", "average_rank", "seed")},
            "key": recipe.key,
            "kind": "classification",
            "config": recipe.to_dict(),
            "validation": {"accuracy": 0.8 if recipe.lr == best[recipe.method] else 0.7},
            "test": None,
        }
        for recipe in grid.search()
    ]


BEST = dict(zip(grid.METHODS, cycle(grid.RATES), strict=False))


@pytest.fixture
def finals(monkeypatch):
    monkeypatch.setattr(grid, "read_rows", lambda: searched(BEST))
    return list(grid.final())


def test_final_runs_share_no_sample_with_the_search(finals):
    """Settings were chosen on seeds of which no final run is."""
    chosen_on = {recipe.seed for phase in (grid.search, grid.factor) for recipe in phase()}
    assert grid.SEARCH_SEED in chosen_on
    assert finals and not chosen_on & {recipe.seed for recipe in finals}


def test_every_run_is_planned_once(finals):
    planned = [*grid.search(), *grid.factor(), *finals]
    assert len({recipe.key for recipe in planned}) == len(planned)
    assert {recipe.phase for recipe in planned} == {"search", "factor", "final"}
    assert {recipe.method for recipe in planned} <= set(METHODS)


def test_methods_are_searched_and_tested_alike(finals):
    """At least the same rates on the same tasks; the same cells for all peers; the rate that the search found."""
    for method in grid.METHODS:
        tried = {(recipe.task, recipe.lr) for recipe in grid.search() if recipe.method == method}
        assert tried >= {(task, rate) for task in grid.SEARCH_TASKS for rate in grid.RATES}
        assert {recipe.lr for recipe in finals if recipe.method == method} == {BEST[method]}
        assert {recipe.settings for recipe in finals if recipe.method == method} == {
            recipe.settings for recipe in grid.search() if recipe.method == method
        }
    cells = [{(recipe.task, recipe.average_rank, recipe.seed) for recipe in finals if recipe.method == m} for m in grid.PEERS]
    assert all(found == cells[0] for found in cells)


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
    assert bad == {"key": folders[1].key, "phase": "search", "config": folders[1].to_dict()}
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
