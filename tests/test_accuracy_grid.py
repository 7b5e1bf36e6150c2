"""Which runs there are, and that each is run once: by one process, and never again once its row is there."""

from collections import defaultdict
from functools import partial

import pytest
from accuracy_models import reviews, tiny
from accuracy_searches import BEST, searched, study

from bench.accuracy import grid, rows
from bench.accuracy import run as runs
from bench.accuracy.methods import METHODS
from bench.accuracy.recipe import PHASES
from bench.accuracy.searches import SAME_TIME
from bench.accuracy.tasks import kind_of


@pytest.fixture(scope="module")
def finals():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(grid, "read_rows", searched)
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
    reference = next(recipe for recipe in swept if recipe.options == grid.LONG_COBRA)
    assert {recipe.estimator for recipe in swept} == {"paper", "conductance", "direct"}
    assert {recipe.path_points for recipe in swept} == {2, reference.path_points}
    assert not any(set(recipe.options) & {*grid.CALIBRATION, "lr"} for recipe in swept)
    halved = [recipe for recipe in swept if recipe.lr == reference.lr / 2]
    assert {recipe.options.get("scaling") for recipe in halved} == {4.0, None}


def test_methods_are_tested_alike(finals):
    """At the rate that the search found for kind, rank and conditions, in the form that was searched, in the same cells."""
    forms = {(study(recipe), recipe.settings) for recipe in grid.search()}
    cells = defaultdict(set)
    for recipe in finals:
        assert recipe.lr == BEST[study(recipe)]
        assert recipe.method in grid.LIKE or (study(recipe), recipe.settings) in forms
        conditions = recipe.steps, recipe.examples, recipe.noise, recipe.max_length
        cells[recipe.method].add((recipe.model, recipe.task, recipe.average_rank, conditions, recipe.seed))
    for method, found in cells.items():
        assert found <= cells["lora"], method
    longer = {conditions["steps"] for conditions in SAME_TIME.values()}
    assert cells["cobra+long"] == {cell for cell in cells["lora"] if cell[3][0] not in longer}
    usual = [(200, 2000, 0.0, 64), (50, 2000, 0.0, 64), (60, 1000, 0.0, 128)]
    everywhere = {cell for cell in cells["lora"] if cell[0] != "mpnet" and cell[2] in (2, 8) and cell[3] in usual}
    assert cells["adalora"] == everywhere


def test_a_method_without_a_finished_search_is_not_tested(monkeypatch):
    found = searched()
    last = next(row for row in reversed(found) if row["method"] == "cobra+long" and row["kind"] == "regression")
    monkeypatch.setattr(grid, "read_rows", lambda: [row for row in found if row is not last])
    left = {(kind_of(recipe.task), recipe.method, recipe.model) for recipe in grid.final()}
    assert ("regression", "cobra+long", last["model"]) not in left
    assert {
        ("classification", "cobra", "minilm"),
        ("regression", "lora", "mpnet"),
        ("language", "cobra+long", "smollm2"),
    } <= left


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """The grid at work in folders of its own, on two tiny searches of which one diverges."""
    for name, folder in (("read_rows", "rows"), ("append_row", "rows"), ("claim", "claims")):
        monkeypatch.setattr(grid, name, partial(getattr(rows, name), folder=tmp_path / folder))
    planned = [tiny("lora"), tiny("lora", lr=1e30)]
    monkeypatch.setattr(grid, "search", lambda: planned)
    monkeypatch.setattr(runs, "_task", lambda name, data: reviews())
    yield planned
    runs.started.cache_clear()


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
