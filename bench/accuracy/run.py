"""One recipe to one row."""

from __future__ import annotations

import platform
import random
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import cobra
from bench.accuracy.encoder import Encoded, fit_head, load_model, predict
from bench.accuracy.methods import Attached, attach, needs_scores
from bench.accuracy.metrics import classification_metrics, pack_per_example, regression_metrics
from bench.accuracy.recipe import Recipe
from bench.accuracy.tasks import Example, Task, load_task, sample

CACHE = Path("runs/evidence-cache")
PACKAGES = ("torch", "transformers", "peft", "cobra-peft")


@dataclass
class Seconds:
    spent: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.spent[stage] = round(time.perf_counter() - start, 2)


def run(recipe: Recipe, data: Path | None = None) -> dict:
    """Trains and evaluates. Raises ValueError where the training diverged."""
    task = load_task(recipe.task, data)
    model, tokenizer = load_model(task)
    examples = _noisy(sample(task, recipe.examples, recipe.seed), task, recipe)
    train = Encoded.of(examples, tokenizer, task.kind, recipe.max_length)
    seconds = Seconds()
    torch.manual_seed(recipe.seed)
    with _precision(recipe):
        with seconds.of("head"):
            fit_head(model, train)
        head_parameters = sum(p.numel() for p in model.classifier.parameters())
        scores = None
        if needs_scores(recipe):
            with seconds.of("calibrate"):
                scores = _calibrate(recipe, model, train)
        calibration = list(range(min(recipe.calibration_examples, len(train))))
        attached = attach(recipe, model, scores, lambda: [train.batch(calibration[i : i + 16]) for i in range(0, 64, 16)])
        with seconds.of("train"):
            losses = _train(attached, train, recipe)
        splits = {"validation": task.validation} | ({"test": task.test} if recipe.phase == "final" else {})
        with seconds.of("evaluate"):
            found = {
                name: _evaluate(attached.model, Encoded.of(rows, tokenizer, task.kind, recipe.max_length), task, name == "test")
                for name, rows in splits.items()
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
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"
        if not torch.cuda.is_available()
        else torch.cuda.get_device_name(),
        "seconds": seconds.spent,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "trainable_parameters": attached.parameters(),
        "head_parameters": head_parameters,
        "ranks": attached.ranks(),
        "train_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "validation": found["validation"],
        "test": found.get("test"),
    }


def _precision(recipe: Recipe):
    if recipe.precision == "fp32":
        return nullcontext()
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16)


def _noisy(examples: Sequence[Example], task: Task, recipe: Recipe) -> Sequence[Example]:
    """A share of the labels moved to another class; the same ones for every method."""
    drawn = random.Random(recipe.seed)
    chosen = set(drawn.sample(range(len(examples)), round(recipe.noise * len(examples))))
    return tuple(
        replace(e, label=(e.label + drawn.randrange(1, task.classes)) % task.classes) if i in chosen else e
        for i, e in enumerate(examples)
    )


def _calibrate(recipe: Recipe, model: nn.Module, train: Encoded) -> cobra.LayerScores:
    """In fp32 whatever the training's precision."""
    rows = range(min(recipe.calibration_examples, len(train)))
    batches = [train.batch(rows[i : i + 16]) for i in range(0, len(rows), 16)]
    with torch.autocast("cpu", enabled=False):
        return cobra.calibrate(
            model,
            batches,
            steps=recipe.path_points,
            estimator=recipe.estimator,
            max_examples=len(rows),
            progress=False,
            granularity=recipe.options.get("granularity", "site"),
        )


def _train(attached: Attached, train: Encoded, recipe: Recipe) -> list[float]:
    warmup = max(1, round(recipe.warmup * recipe.steps))

    def rate(step: int) -> float:
        return min((step + 1) / warmup, max(0.0, (recipe.steps - step) / (recipe.steps - warmup)))

    schedule = LambdaLR(attached.optimizer, rate)
    torch.manual_seed(recipe.seed)
    attached.model.train()
    losses = []
    for step, batch in enumerate(train.shuffled(recipe.batch_size, recipe.steps, recipe.seed), 1):
        loss = attached.model(**batch).loss
        (loss + attached.penalty()).backward()
        attached.optimizer.step()
        schedule.step()
        attached.after_step(step)
        attached.optimizer.zero_grad()
        losses.append(loss.item())
        if not loss.isfinite():
            raise ValueError(f"{recipe.method} on {recipe.task}, lr {recipe.lr:g}: the loss of step {step} is {loss.item()}")
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
