"""One recipe to one row."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

import cobra
from bench.accuracy.encoder import Encoded, fit_head, load_model, predict
from bench.accuracy.methods import Attached, attach, directions_needed, needs_scores
from bench.accuracy.metrics import classification_metrics, pack_per_example, regression_metrics
from bench.accuracy.recipe import Recipe
from bench.accuracy.tasks import Example, Task, load_task, sample

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PACKAGES = ("torch", "transformers", "peft", "cobra-peft")


class Diverged(ValueError):
    """A training whose loss is not finite; the message names the step."""


@dataclass
class Seconds:
    spent: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.spent[stage] = round(time.perf_counter() - start, 2)


@dataclass(frozen=True, eq=False)
class Start:
    """Where every method on one task and seed starts from: the training examples and the head fitted on frozen features."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    train: Encoded
    head: dict[str, Tensor]

    def model(self, dropout: float) -> nn.Module:
        model, _ = load_model(self.task, dropout)
        model.classifier.load_state_dict(self.head)
        return model

    def encode(self, examples: Sequence[Example], max_length: int) -> Encoded:
        return Encoded.of(examples, self.tokenizer, self.task.kind, max_length)


def run(recipe: Recipe, data: Path | None = None) -> dict:
    """Trains and evaluates, on the CPU. Raises Diverged, and ValueError for another model than MiniLM."""
    if recipe.model != "minilm":
        raise ValueError(f"model={recipe.model!r}: runs are of 'minilm' alone")
    start = _start(recipe.task, data, recipe.examples, recipe.seed, recipe.noise, recipe.max_length, recipe.precision)
    task, train, seconds = start.task, start.train, Seconds()
    torch.manual_seed(recipe.seed)  # peft draws its matrices from it, whatever ran in this process before
    model = start.model(recipe.dropout)
    head_parameters = sum(p.numel() for p in model.classifier.parameters())
    scores = None
    if needs_scores(recipe):
        granularity = recipe.options.get("granularity", "site")
        path = (recipe.calibration_examples, recipe.path_points, recipe.estimator, granularity, directions_needed(recipe))
        scores, seconds.spent["calibrate"] = _calibrated(start, *path)
    _forget_peak_memory()
    rows = range(min(recipe.calibration_examples, len(train)))
    attached = attach(recipe, model, scores, lambda: [train.batch(rows[i : i + 16]) for i in range(0, len(rows), 16)])
    with seconds.of("train"):
        losses = _train(attached, train, recipe)
    splits = {"validation": task.validation} | ({"test": task.test} if recipe.phase == "final" else {})
    with seconds.of("evaluate"), _precision(recipe.precision):
        found = {
            name: _evaluate(attached.model, start.encode(examples, recipe.max_length), task, name == "test")
            for name, examples in splits.items()
        }
    return {
        "key": recipe.key,
        "phase": recipe.phase,
        "task": recipe.task,
        "kind": task.kind,
        "model": recipe.model,
        "method": recipe.method,
        "average_rank": recipe.average_rank,
        "seed": recipe.seed,
        "config": recipe.to_dict(),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "seconds": seconds.spent,
        "peak_memory_mb": _peak_memory_mb(),
        "trainable_parameters": attached.parameters(),
        "head_parameters": head_parameters,
        "ranks": attached.ranks(),
        "train_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "validation": found["validation"],
        "test": found.get("test"),
    }


def _forget_peak_memory() -> None:
    """What ran in this process before does not count."""
    if CLEAR.exists():
        CLEAR.write_text("5")


def _peak_memory_mb() -> int | None:
    """Of the process since `_forget_peak_memory`; None where the system does not say."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")), None)


def _precision(precision: str):
    """For one forward, or for weights that stay: autocast keeps its copies of parameters until the block ends."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast("cpu", dtype=torch.bfloat16)


@lru_cache(maxsize=8)
def _start(name: str, data: Path | None, examples: int, seed: int, noise: float, max_length: int, precision: str) -> Start:
    task = _task(name, data)
    model, tokenizer = load_model(task)
    train = Encoded.of(_noisy(sample(task, examples, seed), task, noise, seed), tokenizer, task.kind, max_length)
    torch.manual_seed(seed)
    with _precision(precision):
        fit_head(model, train)
    return Start(task, tokenizer, train, {k: v.detach().clone() for k, v in model.classifier.state_dict().items()})


_task = lru_cache(maxsize=8)(load_task)


def _noisy(examples: Sequence[Example], task: Task, share: float, seed: int) -> Sequence[Example]:
    """A share of the labels moved to another class; the same ones for every method."""
    if not share:
        return examples
    drawn = random.Random(seed)
    chosen = set(drawn.sample(range(len(examples)), round(share * len(examples))))
    return tuple(
        replace(e, label=(e.label + drawn.randrange(1, task.classes)) % task.classes) if i in chosen else e
        for i, e in enumerate(examples)
    )


@lru_cache(maxsize=16)
def _calibrated(
    start: Start, examples: int, points: int, estimator: str, granularity: str, directions: int
) -> tuple[cobra.LayerScores, float]:
    """Scores and the seconds they took; in fp32, whatever the training's precision."""
    began, rows = time.perf_counter(), range(min(examples, len(start.train)))
    scores = cobra.calibrate(
        start.model(0.0),
        [start.train.batch(rows[i : i + 16]) for i in range(0, len(rows), 16)],
        steps=points,
        estimator=estimator,
        max_examples=len(rows),
        progress=False,
        granularity=granularity,
        directions=directions,
    )
    return scores, round(time.perf_counter() - began, 2)


def _train(attached: Attached, train: Encoded, recipe: Recipe) -> list[float]:
    warmup = max(1, round(recipe.warmup * recipe.steps))

    def rate(step: int) -> float:
        return min((step + 1) / warmup, max(0.0, (recipe.steps - step) / max(1, recipe.steps - warmup)))

    schedule = LambdaLR(attached.optimizer, rate)
    torch.manual_seed(recipe.seed)
    attached.model.train()
    losses = []
    for step, batch in enumerate(train.shuffled(recipe.batch_size, recipe.steps, recipe.seed), 1):
        with _precision(recipe.precision):
            loss = attached.model(**batch).loss
        if not loss.isfinite():  # before a cut, which finds no gates to rank
            raise Diverged(f"{recipe.method} on {recipe.task}, lr {recipe.lr:g}: the loss of step {step} is {loss.item()}")
        (loss + attached.penalty()).backward()
        attached.optimizer.step()
        schedule.step()
        attached.after_step(step)
        attached.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _evaluate(model: nn.Module, data: Encoded, task: Task, per_example: bool) -> dict:
    predictions = predict(model, data)
    if task.kind == "regression":
        found = regression_metrics(predictions, data.labels)
        each = (predictions - data.labels).square().numpy()
    else:
        found = classification_metrics(predictions, data.labels)
        each = (predictions.argmax(1) == data.labels).numpy()
    return {**found, "per_example": pack_per_example(each)} if per_example else found
