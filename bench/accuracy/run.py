"""One recipe to one row."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

import cobra
from bench.accuracy import language
from bench.accuracy.bf16 import bf16_products
from bench.accuracy.encoder import LOADERS, Batch, Encoded, fit_head, load_model, predict
from bench.accuracy.machine import Seconds, check_device, forget_peak_memory, machine_name, peak_memory_mb, source_digest
from bench.accuracy.methods import Attached, attach, directions_needed, needs_scores
from bench.accuracy.metrics import (
    SCALED,
    classification_metrics,
    fit_temperature,
    language_metrics,
    pack_per_example,
    regression_metrics,
)
from bench.accuracy.recipe import Recipe
from bench.accuracy.tasks import Example, Task, load_task, sample, subset

LANGUAGE_MODEL = "smollm2"
MODELS = (*LOADERS, LANGUAGE_MODEL)
PACKAGES = ("torch", "transformers", "peft", "cobra-peft")


class Diverged(ValueError):
    """A training whose loss is not finite; the message names the step."""


@dataclass(frozen=True, eq=False)
class Start:
    """Where every method on one task and seed starts from.

    head: fitted on frozen features; None for a language model
    """

    name: str
    task: Task
    tokenizer: PreTrainedTokenizerBase
    train: Encoded
    head: dict[str, Tensor] | None

    def model(self, dropout: float) -> nn.Module:
        model, _ = _load(self.name, self.task, dropout)
        if self.head is not None:
            model.classifier.load_state_dict(self.head)
        return model.to(self.train.device)

    def encode(self, examples: Sequence[Example], max_length: int) -> Encoded:
        return _encode(self.task, examples, self.tokenizer, max_length, self.train.device)

    def batches(self, examples: int) -> list[Batch]:
        """The first training examples, as a calibration takes them."""
        size = 16 if self.head is not None else language.BATCH
        rows = range(min(examples, len(self.train)))
        return [self.train.batch(rows[i : i + size]) for i in range(0, len(rows), size)]


def run(recipe: Recipe, data: Path | None = None, device: str = "cpu") -> dict:
    """Trains and evaluates.

    data: folder of the published sets; device: "cpu" or "cuda", which is no part of the recipe: the row names the machine

    Raises Diverged, ValueError for a device that is not there and for a model, dropout or noise that do not fit the task, and
    FileNotFoundError where weights or texts are missing.
    """
    check_device(device)
    with bf16_products() if recipe.precision == "bf16" else nullcontext():
        return _run(recipe, data, device)


def _run(recipe: Recipe, data: Path | None, device: str) -> dict:
    start = started(
        *(recipe.task, data, recipe.examples, recipe.seed, recipe.noise, recipe.max_length, recipe.precision),
        *(recipe.model, device),
    )
    task, train, seconds = start.task, start.train, Seconds(device)
    torch.manual_seed(recipe.seed)  # peft draws its matrices from it, whatever ran in this process before
    model = start.model(recipe.dropout)
    head_parameters = sum(tensor.numel() for tensor in (start.head or {}).values())
    scores = None
    if needs_scores(recipe):
        granularity = recipe.options.get("granularity", "site")
        path = (recipe.calibration_examples, recipe.path_points, recipe.estimator, granularity, directions_needed(recipe))
        scores, seconds.spent["calibrate"] = calibrated(start, *path)
    forget_peak_memory(device)
    attached = attach(recipe, model, scores, lambda: start.batches(recipe.calibration_examples))
    if recipe.precision == "bf16" and recipe.method != "dora":  # which reads the weights themselves
        _store_frozen(attached.model, torch.bfloat16)
    with seconds.of("train"):
        losses = _train(attached, train, recipe)
    splits = {"validation": subset(task.validation, recipe.validation_examples)}
    if recipe.phase == "final":
        splits["test"] = subset(task.test, recipe.test_examples)
    with seconds.of("evaluate"), _precision(recipe.precision, device):
        outputs = {name: _outputs(attached.model, start.encode(e, recipe.max_length), task) for name, e in splits.items()}
    found = {name: _metrics(task, *pair) for name, pair in outputs.items()}
    if "test" in found:
        found["test"] |= _on_test(task, *outputs["test"], *outputs["validation"])
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
        "code": source_digest(),
        "machine": machine_name(device),
        "seconds": seconds.spent,
        "peak_memory_mb": peak_memory_mb(device),
        "trainable_parameters": attached.parameters(),
        "head_parameters": head_parameters,
        "ranks": attached.ranks(),
        "train_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "validation": found["validation"],
        "test": found.get("test"),
    }


def _precision(precision: str, device: str):
    """For one forward, or for weights that stay: autocast keeps its copies of parameters until the block ends."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


@lru_cache(maxsize=8)
def started(
    name: str,
    data: Path | None,
    examples: int,
    seed: int,
    noise: float,
    max_length: int,
    precision: str,
    model_name: str = "minilm",
    device: str = "cpu",
) -> Start:
    task = _task(name, data)
    model, tokenizer = _load(model_name, task)
    drawn = _noisy(sample(task, examples, seed), task, noise, seed)
    train = _encode(task, drawn, tokenizer, max_length, device)
    if task.kind == "language":
        return Start(model_name, task, tokenizer, train, None)
    torch.manual_seed(seed)
    model.to(device)
    with _precision(precision, device):
        fit_head(model, train)
    head = {k: v.detach().clone() for k, v in model.classifier.state_dict().items()}
    return Start(model_name, task, tokenizer, train, head)


_task = lru_cache(maxsize=8)(load_task)


def _load(name: str, task: Task, dropout: float = 0.0) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    if name not in MODELS or (name == LANGUAGE_MODEL) != (task.kind == "language"):
        fitting = (LANGUAGE_MODEL,) if task.kind == "language" else tuple(LOADERS)
        raise ValueError(f"model={name!r}: {task.name} is a {task.kind} task, for {' or '.join(fitting)}")
    if name != LANGUAGE_MODEL:
        return load_model(task, dropout, name)
    if dropout:
        raise ValueError(f"dropout={dropout}: {name} has none")
    return language.load_language_model()


def _encode(task: Task, examples: Sequence[Example], tokenizer, max_length: int, device: str) -> Encoded:
    if task.kind == "language":
        encoded = language.encode(examples, tokenizer, max_length)
    else:
        encoded = Encoded.of(examples, tokenizer, task.kind, max_length)
    return replace(encoded, device=device)


def _noisy(examples: Sequence[Example], task: Task, share: float, seed: int) -> Sequence[Example]:
    """A share of the labels moved to another class; the same ones for every method."""
    if not share:
        return examples
    if task.kind != "classification":
        raise ValueError(f"noise={share}: {task.name} is a {task.kind} task; only classes can be moved")
    drawn = random.Random(seed)
    chosen = set(drawn.sample(range(len(examples)), round(share * len(examples))))
    return tuple(
        replace(e, label=(e.label + drawn.randrange(1, task.classes)) % task.classes) if i in chosen else e
        for i, e in enumerate(examples)
    )


@lru_cache(maxsize=16)
def calibrated(
    start: Start, examples: int, points: int, estimator: str, granularity: str, directions: int
) -> tuple[cobra.LayerScores, float]:
    """Scores and the seconds they took; in fp32, whatever the training's precision."""
    began = time.perf_counter()
    scores = cobra.calibrate(
        start.model(0.0),
        start.batches(examples),
        steps=points,
        estimator=estimator,
        max_examples=examples,
        progress=False,
        granularity=granularity,
        directions=directions,
    )
    return scores, round(time.perf_counter() - began, 2)


def _store_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen weights of linear layers in autocast's dtype, which casts them at every forward otherwise: the same products.

    Those tied to an embedding stay: it is not cast.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and id(module.weight) not in embeddings:
            module.weight.data = module.weight.data.to(dtype)


def _train(attached: Attached, train: Encoded, recipe: Recipe) -> list[float]:
    warmup = max(1, round(recipe.warmup * recipe.steps))

    def rate(step: int) -> float:
        return min((step + 1) / warmup, max(0.0, (recipe.steps - step) / max(1, recipe.steps - warmup)))

    schedule = LambdaLR(attached.optimizer, rate)
    torch.manual_seed(recipe.seed)
    attached.model.train()
    losses = []
    for step, batch in enumerate(train.shuffled(recipe.batch_size, recipe.steps, recipe.seed), 1):
        with _precision(recipe.precision, train.device):
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


def _outputs(model: nn.Module, data: Encoded, task: Task) -> tuple[Tensor, Tensor]:
    """Logits or predictions and labels; of a language model the losses of texts, summed, and their tokens."""
    return language.losses(model, data) if task.kind == "language" else (predict(model, data), data.labels)


def _metrics(task: Task, outputs: Tensor, labels: Tensor) -> dict[str, float]:
    of_kind = {"language": language_metrics, "regression": regression_metrics, "classification": classification_metrics}
    return of_kind[task.kind](outputs, labels)


def _on_test(task: Task, outputs: Tensor, labels: Tensor, known: Tensor, known_labels: Tensor) -> dict:
    """The result of every example; of classes also NLL, ECE and Brier score at the temperature that fits validation.

    known, known_labels: those of the validation split
    """
    if task.kind == "language":
        return {"per_example": pack_per_example((outputs / labels).numpy())}
    if task.kind == "regression":
        return {"per_example": pack_per_example((outputs - labels).square().numpy())}
    temperature = fit_temperature(known, known_labels)
    scaled = classification_metrics(outputs / temperature, labels)
    return {
        "per_example": pack_per_example((outputs.argmax(1) == labels).numpy()),
        "temperature": temperature,
        **{name: scaled[name.removeprefix("scaled_")] for name in SCALED},
    }
