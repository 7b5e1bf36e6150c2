"""Runs of a few steps, end to end on reviews: rows are complete, the same again, and see what their phase allows."""

import re
from dataclasses import replace

import pytest
import torch
from accuracy_models import reviews, tiny

from bench.accuracy import run as runs
from bench.accuracy.forms import SETTINGS
from bench.accuracy.methods import METHODS
from bench.accuracy.metrics import SCALED, classification_metrics, unpack_per_example
from bench.accuracy.run import Diverged, run
from bench.accuracy.tasks import Example

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")
FIELDS = {
    "key", "phase", "task", "kind", "model", "method", "average_rank", "seed", "config", "versions", "code", "machine",
    "seconds", "peak_memory_mb", "trainable_parameters", "head_parameters", "ranks", "train_loss", "validation", "test",
}  # fmt: skip
METRICS = {"accuracy", "macro_f1", "mcc", "nll", "ece", "brier"}


@pytest.fixture(autouse=True)
def few_examples(monkeypatch):
    """rt, with short validation and test splits."""
    monkeypatch.setattr(runs, "_task", lambda name, data: {"rt": reviews()}[name])
    yield
    forget()


def forget() -> None:
    runs.started.cache_clear()
    runs.calibrated.cache_clear()


def recipe_of(method: str, **changes):
    return tiny(method, settings=tuple(SETTINGS.get(method, {}).items()), **changes)


def without_costs(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in ("seconds", "peak_memory_mb")}


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "cobra"])
def test_rows_are_complete_and_repeat(method):
    """The same bits again, also after other runs and where nothing is cached."""
    recipe = recipe_of(method)
    row = run(recipe)
    assert row.keys() == FIELDS and row["validation"].keys() == METRICS
    assert row["key"] == recipe.key and row["config"] == recipe.to_dict()
    assert (row["phase"], row["test"]) == ("search", None)
    assert row["seconds"].keys() == {"train", "evaluate"} | ({"calibrate"} if method == "cobra" else set())
    assert row["trainable_parameters"] == 2 * 41472 and row["head_parameters"] == 2 * 384 + 2
    torch.manual_seed(5)
    torch.rand(3)
    cached = run(recipe)
    forget()
    torch.rand(3)
    assert without_costs(run(recipe)) == without_costs(cached) == without_costs(row)


def test_final_runs_see_the_test_split():
    row = run(recipe_of("lora", phase="final"))
    right = unpack_per_example(row["test"].pop("per_example"))
    assert row["test"].keys() == METRICS | SCALED.keys() | {"temperature"} and row["validation"].keys() == METRICS
    assert len(right) == len(reviews().test) and right.mean() == pytest.approx(row["test"]["accuracy"])


def test_the_temperature_is_of_validation():
    """What a known factor on the logits changes is undone, from labels that are not those of the test."""
    torch.manual_seed(0)
    known, logits = torch.randn(5000, 2).double(), torch.randn(2000, 2).double()
    known_labels, labels = (torch.multinomial(x.softmax(1), 1)[:, 0] for x in (known, logits))
    found = runs._on_test(reviews(), 4 * logits, labels, 4 * known, known_labels)
    plain, sharp = classification_metrics(logits, labels), classification_metrics(4 * logits, labels)
    assert found["temperature"] == pytest.approx(4, rel=0.1)
    assert found["scaled_nll"] == pytest.approx(plain["nll"], abs=2e-3) and found["scaled_ece"] < 0.2 * sharp["ece"]
    assert found["scaled_brier"] == pytest.approx(plain["brier"], abs=2e-3)


@pytest.mark.parametrize("method", ["lora", "cobra"])
def test_divergence_is_told_from_other_errors(method):
    """Also where the loss is lost before the very step that cuts the gates."""
    with pytest.raises(Diverged, match=rf"{method} on rt, lr 1e\+30: the loss of step 2 is (nan|inf)"):
        run(recipe_of(method, lr=1e30, steps=5))


def test_other_models_and_methods_are_refused():
    for model in ("bert", "smollm2"):
        with pytest.raises(ValueError, match=f"model='{model}': rt is a classification task, for minilm or mpnet"):
            run(recipe_of("lora", model=model))
    with pytest.raises(ValueError, match=f"method='qlora' is not one of {re.escape(', '.join(METHODS))}"):
        run(recipe_of("qlora"))


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "adalora", "cobra"])
def test_regressions_run(monkeypatch, method):
    """Real labels from start to end: errors of every test text average to the row's, and rows pass for one cell."""
    short = {name: tuple(replace(e, label=0.1 * len(e.text) % 1) for e in rows) for name, rows in reviews().splits.items()}
    monkeypatch.setattr(runs, "_task", lambda name, data: replace(reviews(), kind="regression", classes=1, **short))
    row = run(recipe_of(method, phase="final", task="tweets", test_examples=20))
    assert row["validation"].keys() == {"mse", "mae", "pearson", "spearman"}
    errors = unpack_per_example(row["test"]["per_example"])
    assert len(errors) == 20 and errors.mean() == pytest.approx(row["test"]["mse"], rel=1e-5)
    assert row["kind"] == "regression" and row["head_parameters"] == 384 + 1
    with pytest.raises(ValueError, match=r"noise=0\.2: rt is a regression task; only classes can be moved"):
        run(recipe_of(method, task="tweets", noise=0.2))


@pytest.mark.parametrize(("classes", "share"), [(2, 0.25), (6, 0.3)])
def test_noise_moves_exactly_its_share_of_the_labels(classes, share):
    """To another class each, the same ones for every method."""
    task = replace(reviews(), classes=classes)
    examples = [Example(f"text {i}", i % classes) for i in range(200)]
    noisy = runs._noisy(examples, task, share, seed=3)
    assert [e.text for e in noisy] == [e.text for e in examples]
    assert sum(a.label != b.label for a, b in zip(noisy, examples, strict=True)) == round(share * 200)
    assert {e.label for e in noisy} == set(range(classes))
    assert noisy == runs._noisy(examples, task, share, seed=3) != runs._noisy(examples, task, share, seed=4)
    assert runs._noisy(examples, task, 0.0, seed=3) == examples


def test_noise_is_in_training_alone():
    """The labels that a run learns from, and not those that judge it."""
    clean, noisy = (runs.started("rt", None, 24, 0, noise, 12, "bf16") for noise in (0.0, 0.5))
    assert (clean.train.labels != noisy.train.labels).sum() == 12
    assert clean.task is noisy.task
    assert not torch.equal(clean.head["weight"], noisy.head["weight"])
