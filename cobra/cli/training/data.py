"""The rows of a run: read, split, and their labels made into what the task's model takes."""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path

from cobra.cli.subject import Source
from cobra.cli.subject_data import label_values
from cobra.cli.textfile import Columns, Example, as_numbers, read_examples
from cobra.cli.training.settings import TASKS, SubjectSettings, TrainSettings


@dataclass(frozen=True)
class Split:
    """Rows to train on, in an order of the seed, and rows to evaluate on.

    fingerprints: what was read -> SHA-256
    """

    train: list[Example]
    test: list[Example]
    fingerprints: dict[str, str]


@dataclass(frozen=True)
class Targets:
    """What is learnt: class numbers, numbers, or None for a language model, whose tokens say it.

    classes: names for a new head; None where the model has its own, or needs none
    """

    task: str
    train: list[int] | list[float] | None
    test: list[int] | list[float] | None
    classes: tuple[str, ...] | None


def check_task(settings: SubjectSettings, source: Source) -> None:
    """Raises ValueError for a task that the model's class is not for, before any data is read."""
    if source.task == "images":
        raise ValueError(f"{source.words} takes images; write the loop yourself, with cobra.calibrate and cobra.attach")
    if source.task in ("classification", "regression") and settings.task not in (None, source.task):
        raise ValueError(f"{source.words} is a {source.task} model, and the task is {settings.task}: take its base model")
    _check_one_label(source)
    if source.task == "encoder" and settings.task == "causal-lm":
        raise ValueError(f"{source.words} is an encoder: it writes no text; expected a task {TASKS[0]} or {TASKS[1]}")
    if is_language_model(settings, source):
        if settings.pair is not None:
            raise ValueError("pair is for classification and regression; a language model has prompt and response")
    elif settings.prompt is not None:
        raise ValueError(f"prompt and response are for language models, and {source.words} is trained on labels here")


def _check_one_label(source: Source) -> None:
    """Raises ValueError for a classifier or regressor that learns several labels or numbers of a row."""
    kind, outputs = source.config.problem_type, source.config.num_labels
    if source.task == "classification" and kind == "multi_label_classification":
        several = f"{outputs} labels of a row at once (problem_type {kind} in its config.json)"
    elif source.task == "regression" and outputs > 1:
        several = f"{outputs} numbers of a row at once (num_labels and problem_type {kind} in its config.json)"
    else:
        return
    raise ValueError(
        f"{source.words} learns {several}, and rows have one label here: take its base model, or write the loop yourself, with "
        "cobra.calibrate and cobra.attach"
    )


def is_language_model(settings: SubjectSettings, source: Source) -> bool:
    return (settings.task or source.task) == "causal-lm"


def read_rows(settings: SubjectSettings, source: Source) -> Split:
    """All rows, none held out. Raises what `read_examples` does."""
    rows, fingerprint = _read(settings, settings.data, _columns(settings, source))
    return Split(_shuffled(rows, settings.seed), [], fingerprint)


def read_split(settings: TrainSettings, source: Source) -> Split:
    """Rows to train and to evaluate on: the demo's split by movie, two files, or a share held out.

    Raises what `read_examples` does, and ValueError where too few rows are left to train on.
    """
    columns = _columns(settings, source)
    rows, fingerprints = _read(settings, settings.data, columns)
    rows = _shuffled(rows, settings.seed)
    if settings.data == "reviews":
        from cobra.cli.reviews import load_reviews

        test = [_example(review, columns) for review in load_reviews(settings.seed)[1]]
    elif settings.eval_data is not None:
        test, more = _read(settings, settings.eval_data, columns)
        fingerprints |= more
    else:
        count = max(1, round(settings.eval_share * len(rows)))
        rows, test = rows[count:], rows[:count]
        if not rows:
            raise ValueError(f"{settings.data} has {count} rows and all are held out: take more, or name eval_data")
    return Split(rows[: settings.train_examples], test[: settings.eval_examples], fingerprints)


def find_targets(settings: SubjectSettings, source: Source, split: Split) -> Targets:
    """Labels of both parts. Raises ValueError for labels that the task cannot learn, naming the first."""
    if is_language_model(settings, source):
        return Targets("causal-lm", None, None, None)
    train, test = ([example.label for example in part] for part in (split.train, split.test))
    if len(set(train)) < 2:
        raise ValueError(f"all labels to train on are {train[0]!r}; there is nothing to learn from one")
    numbers = as_numbers(train + test)
    task = settings.task or (source.task if source.task in TASKS[:2] else _task_of(numbers))
    if source.task == task:
        values = label_values(source, split.train + split.test)
        return Targets(task, values[: len(train)], values[len(train) :], None)
    if task == "regression":
        if numbers is None:
            bad = next(label for label in train + test if as_numbers([label]) is None)
            raise ValueError(f"label {bad!r} is no number, and the task is regression")
        return Targets(task, numbers[: len(train)], numbers[len(train) :], None)
    if numbers is not None:
        train, test = ([_whole(label) for label in part] for part in (train, test))
    classes = sorted(set(train), key=lambda label: (float(label), label) if numbers else label)
    ids = {label: number for number, label in enumerate(classes)}
    new = sorted(set(test) - ids.keys())
    if new:
        raise ValueError(
            f"label {new[0]!r} is in the rows to evaluate on and in none to train on: drop these rows or, where they were held "
            "out by chance, take another --seed or a file of --eval-data"
        )
    return Targets(task, [ids[label] for label in train], [ids[label] for label in test], tuple(classes))


def _whole(label: str) -> str:
    """1.0 as 1, as tables write whole numbers where one of the column is missing."""
    return label.partition(".")[0] if re.fullmatch(r"[+-]?\d+\.0+", label) else label


def _task_of(numbers: list[float] | None) -> str:
    fractional = numbers is not None and any(number != int(number) for number in numbers)
    return "regression" if fractional else "classification"


def _columns(settings: SubjectSettings, source: Source) -> Columns:
    if not is_language_model(settings, source):
        return Columns(settings.text, settings.label, settings.pair)
    return Columns(settings.prompt or settings.text, None, settings.response)


def _read(settings: SubjectSettings, data: str, columns: Columns) -> tuple[list[Example], dict[str, str]]:
    rows = read_examples(data, columns, settings.seed)
    if data != "reviews":
        return rows, {data: hashlib.sha256(Path(data).read_bytes()).hexdigest()}
    text = "\n".join(sorted(f"{row.label}\t{row.text}" for row in rows))
    return [_example(row, columns) for row in rows], {data: hashlib.sha256(text.encode()).hexdigest()}


def _example(row, columns: Columns) -> Example:
    """A review, with its label where it is wanted."""
    return Example(row.text, None if columns.label is None else str(row.label))


def _shuffled(rows: list[Example], seed: int) -> list[Example]:
    return random.Random(seed).sample(rows, len(rows))
