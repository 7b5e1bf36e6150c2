"""Language tasks: which tokens count, the loss of every text, and rows of a small random model."""

import copy
import math

import pytest
import torch
from accuracy_models import small_llama, tiny
from torch.nn import functional as F

from bench.accuracy import language, tasks
from bench.accuracy import run as runs
from bench.accuracy.cells import matrix
from bench.accuracy.forms import SETTINGS
from bench.accuracy.methods import COBRA
from bench.accuracy.metrics import unpack_per_example
from bench.accuracy.statistics import check_equal_budget
from bench.accuracy.tasks import Example, Task

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")
PROBLEM = Example("A farmer has two cows and buys three more.\nHow many cows has he?", 0, "2 + 3 = 5\n#### 5")
WORDS = [
    f"{a} {b}: the {c} of a {b}, not a {a}." for a in ("old", "wet", "red") for b in ("cat", "house") for c in ("tail", "roof")
]
MODEL = "smollm2"


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """A random Llama of width 64 in the place of SmolLM2, and dictionary text of a dozen lines."""
    monkeypatch.setattr(language, "_loaded", small_llama)
    found = [tuple(Example(f"{text} {name}", 0) for text in WORDS) for name in ("train", "validation", "test")]
    monkeypatch.setattr(runs, "_task", lambda name, data: Task(name, "language", 0, *found, "made here"))
    yield
    runs.started.cache_clear()
    runs.calibrated.cache_clear()


def recipe_of(method: str, **changes):
    settings = tuple(SETTINGS.get(method, {}).items())
    sizes = {
        "model": MODEL,
        "examples": 8,
        "validation_examples": 5,
        "test_examples": 6,
        "max_length": 16,
        "settings": settings,
    }
    return tiny(method, task="gcide", **{**sizes, **changes})


def test_every_token_of_a_text_counts():
    _, tokenizer = small_llama()
    data = language.encode([Example(text, 0) for text in WORDS], tokenizer, 7)
    for ids, row, text in zip(data.columns["input_ids"], data.labels, WORDS, strict=True):
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"][:7] == row.tolist()
    assert data.batch([3, 1])["labels"].tolist() == data.batch([3, 1])["input_ids"].tolist()


def test_of_a_problem_the_answer_counts():
    """With the end of text, which says where it ends; the question is there to be read."""
    _, tokenizer = small_llama()
    data = language.encode([PROBLEM, Example("So?", 0, "No.")], tokenizer, 64)
    for ids, row in zip(data.columns["input_ids"], data.labels, strict=True):
        assert row[: len(ids)][row[: len(ids)] != -100].tolist() == ids[(row == -100).tolist().index(False) :]
        assert ids[-1] == tokenizer.eos_token_id and (row[len(ids) :] == -100).all()
    question = tokenizer.decode(data.columns["input_ids"][0][: int((data.labels[0] == -100).long().argmin())])
    assert question == tokenizer.decode(tokenizer(PROBLEM.text, add_special_tokens=False)["input_ids"])
    batch = data.batch([1])
    assert batch["labels"].shape == batch["input_ids"].shape and (batch["labels"] != -100).sum() == 3


def test_a_long_question_leaves_half_for_the_answer():
    """It loses its beginning: the end asks."""
    _, tokenizer = small_llama()
    (ids,) = language.encode([PROBLEM], tokenizer, 12).columns["input_ids"]
    assert len(ids) == 12
    assert ids[:6] == tokenizer(f"{PROBLEM.text}\n", add_special_tokens=False)["input_ids"][-6:]
    assert ids[6:] == tokenizer(PROBLEM.text2, add_special_tokens=False)["input_ids"][:6]


def test_losses_are_in_the_order_of_the_texts_and_free_of_padding():
    """Each as the model itself has it for the text alone."""
    base, tokenizer = small_llama()
    model = copy.deepcopy(base)
    examples = [*(Example(" ".join([text] * (1 + i % 3)), 0) for i, text in enumerate(WORDS)), PROBLEM]
    data = language.encode(examples, tokenizer, 40)
    sums, tokens = language.losses(model.train(), data)
    assert not model.training and sums.dtype == torch.float64
    for i, example in enumerate(examples):
        alone = language.encode([example], tokenizer, 40).batch([0])
        own = model(**alone)
        counted = alone["labels"][:, 1:] != -100
        assert tokens[i] == counted.sum()
        assert sums[i] / tokens[i] == pytest.approx(own.loss.item(), rel=1e-4)
        by_hand = F.cross_entropy(own.logits[0, :-1][counted[0]], alone["labels"][0, 1:][counted[0]], reduction="sum")
        assert sums[i] == pytest.approx(by_hand.item(), rel=1e-4)


def test_methods_have_equal_budgets_and_no_head():
    """Final rows of every kind of method: what they train is LoRA's size, and their texts average to the row's loss."""
    rows = [runs.run(recipe_of(method, phase="final", rank=4)) for method in ("lora", "adalora", *COBRA)]
    check_equal_budget(rows)
    for row in rows:
        assert (row["kind"], row["model"], row["head_parameters"]) == ("language", MODEL, 0)
        assert len(row["ranks"]) == 14 and not any("head" in name for name in row["ranks"])
        assert row["validation"].keys() == {"nll", "token_nll", "perplexity"}
        each = unpack_per_example(row["test"]["per_example"])
        assert len(each) == 6 and each.mean() == pytest.approx(row["test"]["nll"], rel=1e-6)
        assert row["test"]["perplexity"] == pytest.approx(math.exp(row["test"]["token_nll"]))
    assert matrix({row["seed"]: row for row in rows[:1]}).shape == (1, 6)


def test_training_lowers_the_loss_and_repeats():
    short, long = (runs.run(recipe_of("lora", steps=steps, lr=1e-2)) for steps in (1, 30))
    assert long["validation"]["nll"] < short["validation"]["nll"] - 0.1
    assert runs.run(recipe_of("lora", steps=30, lr=1e-2))["validation"] == long["validation"]


def test_the_same_texts_are_evaluated_for_every_seed():
    """Without training, every seed has the same loss; of other texts it would be another."""
    found = [runs.run(recipe_of("lora", seed=seed, lr=1e-9))["validation"]["nll"] for seed in (0, 1)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert len(tasks.subset(WORDS, 5)) == 5 and tasks.subset(WORDS, 5) == tasks.subset(WORDS, 5) != tuple(WORDS[:5])
    assert tasks.subset(WORDS, None) is WORDS
    with pytest.raises(ValueError, match="13 examples asked for; the split has 1 to 12"):
        tasks.subset(WORDS, 13)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "minilm"}, "model='minilm': gcide is a language task, for smollm2"),
        ({"dropout": 0.1}, r"dropout=0\.1: smollm2 has none"),
        ({"noise": 0.2}, r"noise=0\.2: gcide is a language task; only classes can be moved"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        runs.run(recipe_of("lora", **changes))


@pytest.mark.slow
def test_smollm2_reads_dictionary_text(monkeypatch):
    """The loader undoes the permutation of the file: without that the loss is over a nat higher."""
    monkeypatch.undo()
    examples = tasks.subset(tasks.load_task("gcide").test, 16)
    model, tokenizer = language.load_language_model()
    sums, tokens = language.losses(model, language.encode(examples, tokenizer, 128))
    assert (tokens == 127).all() and 25 < (sums.sum() / tokens.sum()).exp() < 40
