"""A recipe's key: what decides a run decides it, and nothing else does."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from bench.accuracy.recipe import PHASES, Recipe
from bench.accuracy.rows import read_rows

SETTINGS = {"gate": "mean", "gamma": 1.0, "cut": 0.4}
RECIPE = Recipe("search", "rt", "cobra", 2, 1e-3, 0, settings=tuple(SETTINGS.items()))
CHANGES = {
    "phase": "final",
    "task": "trec",
    "method": "plan",
    "average_rank": 8,
    "lr": 2e-3,
    "seed": 1,
    "model": "other",
    "examples": 100,
    "steps": 7,
    "batch_size": 8,
    "max_length": 32,
    "warmup": 0.1,
    "noise": 0.2,
    "precision": "fp32",
    "dropout": 0.1,
    "calibration_examples": 8,
    "path_points": 4,
    "estimator": "direct",
    "settings": (("gate", "open"),),
    "validation_examples": 50,
    "test_examples": 60,
}


def test_the_key_never_changes():
    """Rows of earlier days are found again: in this process, and in one with another hash seed."""
    assert RECIPE.key == "2a90d3421c1096eb"
    code = f"from bench.accuracy.recipe import Recipe; print({RECIPE!r}.key)"
    command, root = [sys.executable, "-c", code], Path(__file__).parents[1]
    found = subprocess.run(command, env={"PYTHONHASHSEED": "7"}, cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == RECIPE.key


def test_committed_rows_are_found_again():
    """Their configurations, written before some fields were there, still have their keys."""
    rows = read_rows()
    assert rows and all(Recipe.from_dict(row["config"]).key == row["key"] for row in rows)
    assert all(Recipe.from_dict(row["config"]).to_dict() == row["config"] for row in rows)


def test_the_order_of_settings_does_not_count():
    backwards = dataclasses.replace(RECIPE, settings=tuple(reversed(SETTINGS.items())))
    assert backwards == RECIPE and backwards.key == RECIPE.key
    assert RECIPE.to_dict()["settings"] == RECIPE.options == SETTINGS


def test_every_field_counts():
    changed = [dataclasses.replace(RECIPE, **{name: value}) for name, value in CHANGES.items()]
    assert CHANGES.keys() == {field.name for field in dataclasses.fields(Recipe)}
    assert len({RECIPE.key, *(recipe.key for recipe in changed)}) == 1 + len(CHANGES)


def test_a_whole_rank_has_one_spelling():
    same = dataclasses.replace(RECIPE, average_rank=2.0)
    assert same == RECIPE and same.key == RECIPE.key
    assert dataclasses.replace(RECIPE, average_rank=2.5).average_rank == 2.5


@pytest.mark.parametrize("phase", ["test", "", "Final"])
def test_other_phases_are_refused(phase):
    """A misspelt phase would see no test split, and be judged by nothing."""
    with pytest.raises(ValueError, match=f"phase='{phase}' is not one of {', '.join(PHASES)}"):
        dataclasses.replace(RECIPE, phase=phase)


def test_with_settings_changes_only_those():
    changed = RECIPE.with_settings(gate="open", minimum=1)
    assert changed.options == {**SETTINGS, "gate": "open", "minimum": 1}
    assert dataclasses.replace(changed, settings=RECIPE.settings) == RECIPE
    assert changed.key != RECIPE.key and RECIPE.with_settings(gate="mean") == RECIPE
    assert RECIPE.options == SETTINGS


def test_options_are_a_copy():
    RECIPE.options["gate"] = "open"
    assert RECIPE.options == SETTINGS
