"""What a model is worth on held-out batches: metrics of the task, and how far its confidence can be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cobra.cli.training.tokens import MASKED
from cobra.progress import Progress
from cobra.report.measures import calibration_error, pearson, spearman
from cobra.report.run import Bin

BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """metrics: the task's own first, those that are not finite left out; bins: of the reliability diagram"""

    metrics: dict[str, float | int]
    bins: list[Bin]

    def to_dict(self) -> dict:
        return {**self.metrics, "bins": [asdict(one) for one in self.bins]}


def evaluate(model: nn.Module, batches: Sequence[dict[str, Tensor]], task: str, what: str) -> Evaluation:
    """In evaluation mode, which it is left in. `what`: for the progress bar."""
    return evaluate_outputs(_outputs(model, batches, what), task)


def evaluate_outputs(outputs: Iterable[tuple[Tensor, Tensor]], task: str) -> Evaluation:
    """outputs: logits and labels, batch by batch"""
    metrics, bins = _numbers(outputs) if task == "regression" else _choices(outputs, task)
    return Evaluation({name: value for name, value in metrics.items() if math.isfinite(value)}, bins)


def _choices(outputs: Iterable[tuple[Tensor, Tensor]], task: str) -> tuple[dict, list[Bin]]:
    """Of one class or token among several: log-probability of the right one, and whether the likeliest is right."""
    parts = [_confidence(logits, labels, task) for logits, labels in outputs]
    nll, confidence, right = (torch.cat(values) for values in zip(*parts, strict=True))
    bins = _bins(confidence, right)
    mean, share, error = nll.mean().item(), right.double().mean().item(), calibration_error(bins)
    if task == "causal-lm":
        found = {"perplexity": math.exp(min(mean, 700)), "nll": mean, "token accuracy": share}
        return {**found, "ece": error, "tokens": len(nll)}, bins
    return {"accuracy": share, "nll": mean, "ece": error, "examples": len(nll)}, bins


def _confidence(logits: Tensor, labels: Tensor, task: str) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) each: -log p of the label, p of the likeliest, whether that is the label"""
    if task == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
        logits, labels = logits[labels != MASKED], labels[labels != MASKED]
    logits = logits.float()
    nll = F.cross_entropy(logits, labels, reduction="none")
    best = logits.max(-1)
    return nll.double().cpu(), (best.values - logits.logsumexp(-1)).exp().cpu(), (best.indices == labels).cpu()


def _numbers(outputs: Iterable[tuple[Tensor, Tensor]]) -> tuple[dict, list[Bin]]:
    pairs = [(logits[:, 0].double().cpu(), labels.double().cpu()) for logits, labels in outputs]
    found, expected = (torch.cat(values) for values in zip(*pairs, strict=True))
    error = found - expected
    metrics = {
        "pearson": pearson(found, expected).value,
        "spearman": spearman(found, expected).value,
        "mse": error.square().mean().item(),
        "mae": error.abs().mean().item(),
        "examples": len(found),
    }
    return metrics, []


@torch.no_grad()
def _outputs(model: nn.Module, batches: Sequence[dict[str, Tensor]], what: str) -> Iterator[tuple[Tensor, Tensor]]:
    model.eval()
    device = next(model.parameters()).device
    with Progress(what, len(batches)) as bar:
        for batch in batches:
            batch = {key: value.to(device) for key, value in batch.items()}
            labels = batch.pop("labels")
            yield model(**batch).logits, labels
            bar.advance()


def _bins(confidence: Tensor, right: Tensor) -> list[Bin]:
    """Of equal width; empty ones are left out, and so are confidences that are no numbers."""
    finite = confidence.isfinite()
    confidence, right = confidence[finite], right[finite]
    number = (confidence * BINS).long().clamp(max=BINS - 1)
    found = []
    for i in number.unique().tolist():
        mine = number == i
        mean = min(1.0, confidence[mine].double().mean().item())
        found.append(Bin(mean, right[mine].double().mean().item(), int(mine.sum())))
    return found
