"""`cobra diagnose`: calibrates a model several times over and writes where its gradient and contribution disagree."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers.utils import logging as transformers_logging

import cobra
from cobra import storage
from cobra.cli.outputs import check_folder
from cobra.cli.subject import Source, find_model
from cobra.cli.subject_data import image_batches, label_values, text_batches, with_head
from cobra.cli.textfile import Columns, Example, read_examples
from cobra.diagnosis import Diagnosis, diagnose
from cobra.entry import Baseline
from cobra.report import plots
from cobra.report.diagnosis import depth_profile, layer_rows
from cobra.scores import LayerScores

HEAD_EXAMPLES = 2000
FEWEST_FOR_HEAD = 64
IMAGES = "random-images"
TOKEN = "token:"

Prepared = tuple[nn.Module, list, str, list[str]]


@dataclass(frozen=True)
class DiagnosisSettings:
    """model, data: as on the command line

    draws: calibrations on disjoint examples, the first of which is diagnosed
    points: other numbers of path points, on the first draw's examples; None: a half and a fifth of `steps`
    text, label: columns of a file
    baseline: as `calibrate` names them, or token:T, the embedding of token T
    longest: tokens of a text, the rest is cut
    """

    model: str
    data: str
    random_init: bool = False
    text: str = "text"
    label: str = "label"
    granularity: str = "site"
    examples: int = 64
    steps: int = 50
    draws: int = 3
    points: tuple[int, ...] | None = None
    baseline: str = "zero"
    estimator: str = "paper"
    batch_size: int = 8
    longest: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """Calibrations of one model: the one to diagnose, on other examples, with other path points."""

    scores: LayerScores
    draws: list[LayerScores]
    paths: list[LayerScores]
    model: str
    data: str
    notes: tuple[str, ...]


def run_diagnosis(settings: DiagnosisSettings, out: Path) -> Diagnosis:
    """Measures, and writes diagnosis.json, layers.csv, profile.png and .svg, scatter.png and .svg into `out`.

    Raises OSError where `out` cannot be written, and what `measure` does.
    """
    check_folder(out)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    found = measure(settings)
    diagnosis = diagnose(
        found.scores, found.draws, found.paths, model=found.model, data=found.data, notes=found.notes, seed=settings.seed
    )
    diagnosis.save(out / "diagnosis.json")
    storage.write_bytes(out / "layers.csv", layer_rows(diagnosis).csv())
    for kind in ("png", "svg"):
        depth_profile(diagnosis, out / f"profile.{kind}")
        plots.factor_scatter(found.scores, out / f"scatter.{kind}")
    return diagnosis


def measure(settings: DiagnosisSettings) -> Measured:
    """All calibrations. Raises FileNotFoundError and ValueError for what does not fit, the data before the model is loaded."""
    source = find_model(settings.model, settings.random_init)
    if (source.task == "images") != (settings.data == IMAGES):
        need = f"DATA {IMAGES}" if source.task == "images" else "texts"
        raise ValueError(f"{source.words} is measured on {need}, not on {settings.data}")
    model, draws, data, notes = (_images if source.task == "images" else _texts)(settings, source)
    baseline, said = _baseline(settings.baseline, model, source)
    notes = [*notes, *said]
    if source.random:
        notes = [*notes, "the weights are random: nothing here is about a trained model"]

    def calibrated(loader, steps: int) -> LayerScores:
        return cobra.calibrate(
            model,
            loader,
            steps=steps,
            estimator=settings.estimator,
            baseline=baseline,
            granularity=settings.granularity,
            max_examples=settings.examples,
        )

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = calibrated(draws[0], settings.steps)
        notes += dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning))
        others = [calibrated(draw, settings.steps) for draw in draws[1:]]
        paths = [calibrated(draws[0], points) for points in _points(settings)]
    return Measured(scores, others, paths, source.words, data, tuple(notes))


def _baseline(baseline: str, model: nn.Module, source: Source) -> tuple[Baseline, list[str]]:
    """What `calibrate` takes, and a note where its settings will not say it."""
    if not baseline.startswith(TOKEN):
        return baseline, []
    if source.task == "images":
        raise ValueError(f"baseline={baseline!r} is an embedding, and {source.words} takes images")
    token, tokenizer = baseline.removeprefix(TOKEN), source.tokenizer()
    if token not in tokenizer.get_vocab():
        raise ValueError(f"baseline={baseline!r}: the tokenizer has no token {token!r}")
    number = tokenizer.convert_tokens_to_ids(token)
    return model.get_input_embeddings().weight[number].detach().clone(), [f"the path starts at the embedding of {token!r}"]


def _points(settings: DiagnosisSettings) -> Sequence[int]:
    if settings.points is not None:
        return settings.points
    return sorted({max(1, settings.steps // share) for share in (5, 2)} - {settings.steps})


def _images(settings: DiagnosisSettings, source: Source) -> Prepared:
    """(model, loaders, data in words, notes)"""
    draws = [
        image_batches(source.config, settings.examples, settings.batch_size, settings.seed + i) for i in range(settings.draws)
    ]
    return source.load(settings.seed), draws, "random images with random labels", []


def _texts(settings: DiagnosisSettings, source: Source) -> Prepared:
    """As `_images`; draws share no example, and the head is fitted on none of them where there are enough."""
    labelled = source.task != "causal-lm"
    columns = Columns(settings.text, settings.label if labelled else None)
    examples = read_examples(settings.data, columns, settings.seed)
    random.Random(settings.seed).shuffle(examples)
    labels = label_values(source, examples) if labelled else None
    size, notes = settings.examples, []
    if len(examples) < size:
        notes.append(f"{settings.data} has {len(examples)} rows, fewer than the {size} examples asked for")
        size = len(examples)
    count = min(settings.draws, len(examples) // size)
    if count < settings.draws:
        notes.append(f"{settings.data} has rows for {count} of the {settings.draws} draws of {size} examples")
    tokenizer = source.tokenizer()

    def batches(start: int, stop: int, batch_size: int = settings.batch_size):
        wanted = labels[start:stop] if labels is not None else None
        return text_batches(examples[start:stop], wanted, tokenizer, batch_size, min(settings.longest, source.most_tokens))

    draws = [batches(i * size, (i + 1) * size) for i in range(count)]
    model = source.load(settings.seed)
    if source.task == "encoder":
        start = count * size if len(examples) - count * size >= FEWEST_FOR_HEAD else 0
        fitted = batches(start, start + HEAD_EXAMPLES, 64)
        model = with_head(model, fitted, outputs=max(labels) + 1 if isinstance(labels[0], int) else 1)
        notes.append(f"mean pooling and a head fitted on frozen features of {len(fitted.encodings)} rows" + _same(start))
    return model, draws, _words(settings, examples, labelled), notes


def _same(start: int) -> str:
    return "" if start else ", those of the calibration among them"


def _words(settings: DiagnosisSettings, examples: list[Example], labelled: bool) -> str:
    name = "Rotten Tomatoes reviews" if settings.data == "reviews" else Path(settings.data).name
    return f"{name}, {len(examples):,} rows" + ("" if labelled else " of plain text")
