"""The two scalars of each example that calibration reads: F, which is attributed, and the loss L, whose gradient is demanded.

    classification        F = logit of the gold class                    L = cross entropy
    regression            F = the output (summed over outputs)           L = mean squared error
    language modelling    F = mean log-probability of gold tokens        L = minus F

Told apart by shapes: labels (B,) or (B, 1) of integers, labels of floats, labels (B, T) of integers. Label -100 is masked.
Integers for a transformers classifier that is a regression, by its config, are taken as floats, as its own loss does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cobra.batch import Batch

IGNORED = -100


def default_target(model: nn.Module, outputs: Any, batch: Batch) -> Tensor:
    """F of every example, (B,)."""
    logits, labels = _logits_and_labels(model, outputs, batch)
    if labels.is_floating_point():
        return logits.reshape(batch.size, -1).float().sum(1)
    if labels.ndim == 1:
        gold = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        return gold.masked_fill(labels == IGNORED, 0.0)
    return -_token_loss(model, batch, logits, labels)


def default_loss(model: nn.Module, outputs: Any, batch: Batch) -> Tensor:
    """L of every example, (B,); 0 where all labels are masked."""
    logits, labels = _logits_and_labels(model, outputs, batch)
    if labels.is_floating_point():
        return (
            F.mse_loss(logits.reshape(labels.shape).float(), labels.float(), reduction="none").reshape(batch.size, -1).mean(1)
        )
    if labels.ndim == 1:
        return F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORED)
    return _token_loss(model, batch, logits, labels)


def labelled_examples(model: nn.Module, batch: Batch) -> Tensor:
    """Which examples have a label that counts, (B,) bool on the CPU; all where the batch has no labels that are classes."""
    labels = batch.labels
    classes = isinstance(labels, Tensor) and not labels.is_floating_point() and not _is_regression(model)
    if not classes or labels.shape[:1] != (batch.size,):
        return torch.ones(batch.size, dtype=torch.bool)
    labels = _shifted(model, batch, labels) if labels.ndim == 2 else labels
    counts = (labels != IGNORED).cpu()
    return counts.flatten(1).any(1) if counts.ndim > 1 else counts


def check_classes(model: nn.Module, batch: Batch) -> None:
    """Raises ValueError for labels that a transformers classifier has no class for: its own loss would break over them.

    Those of a regression may be any integers, and those of an (inputs, labels) pair do not go to the model.
    """
    labels, classes = batch.labels, getattr(getattr(model, "config", None), "num_labels", None)
    if not classes or "Classification" not in _class_name(model) or _is_regression(model):
        return
    if isinstance(batch.values, Mapping) and isinstance(labels, Tensor) and not labels.is_floating_point():
        _check_range(labels, classes)


def check_against_model(model: nn.Module, outputs: Any, losses: Tensor, batch: Batch) -> None:
    """Raises ValueError where the per-example default does not add up to the loss the model itself returned."""
    own = getattr(outputs, "loss", None)
    if own is None or own.ndim:
        return
    labels = _labels(model, batch)
    weights = torch.ones_like(losses)
    if not labels.is_floating_point():
        gold = _shifted(model, batch, labels) if labels.ndim > 1 else labels
        weights = (gold.reshape(batch.size, -1) != IGNORED).sum(1).to(losses)
    expected = (losses * weights).sum() / weights.sum()
    if weights.any() and not torch.allclose(
        expected, own.to(expected), rtol=2e-3 if own.dtype == torch.float32 else 2e-2, atol=1e-4
    ):
        raise ValueError(
            f"the default per-example loss averages {expected.item():.6g}, the model's own loss is {own.item():.6g}; "
            "pass loss=, a function (outputs, batch) -> (batch,), and target= if the default F does not fit either"
        )


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(f"outputs of type {type(outputs).__name__} have no .logits tensor; pass target= and loss=")
    return logits


def _logits_and_labels(model: nn.Module, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Classes as (B,) where they came as (B, 1), which transformers' classifiers take too. Raises ValueError for classes of
    another shape than the logits have, and for those without a column."""
    logits, labels = _logits(outputs), _labels(model, batch)
    if labels.is_floating_point():
        return logits, labels
    if logits.ndim == 2 and labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} for logits {tuple(logits.shape)}: expected one class {tuple(logits.shape[:-1])} for "
            "each of them (floating point where the task is a regression); or pass target= and loss="
        )
    _check_range(labels, logits.shape[-1])
    return logits, labels


def _labels(model: nn.Module, batch: Batch) -> Tensor:
    labels = batch.labels
    if not isinstance(labels, Tensor):
        raise ValueError("the batch has no tensor 'labels'; add them, or pass target= and loss=")
    return labels.float() if _is_regression(model) else labels


def _class_name(model: nn.Module) -> str:
    """Of the model itself where it is compiled."""
    return type(getattr(model, "_orig_mod", model)).__name__


def _is_regression(model: nn.Module) -> bool:
    """Whether a transformers classifier fits numbers: it then takes integers too, and none of them is a class."""
    config, name = getattr(model, "config", None), _class_name(model)
    if "Classification" not in name or "TokenClassification" in name:
        return False
    problem = getattr(config, "problem_type", None)
    return problem == "regression" or (problem is None and getattr(config, "num_labels", None) == 1)


def _check_range(labels: Tensor, classes: int) -> None:
    bad = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if bad.numel() and classes == 1:
        raise ValueError(
            f"label {int(bad[0])} is out of range: the model has one output, and integer labels count classes; "
            "make the labels floating point if this is a regression"
        )
    if bad.numel():
        raise ValueError(
            f"label {int(bad[0])} is out of range: the model has {classes} classes (and -100 means masked); "
            "correct the labels, which count from 0, or load the model with more classes"
        )


def _shifts_labels(model: nn.Module, batch: Batch) -> bool:
    """transformers' causal language models shift labels themselves; an (inputs, labels) pair is shifted already."""
    config = getattr(model, "config", None)
    # every config of transformers says whether it is of an encoder-decoder
    if isinstance(batch.values, tuple) or getattr(config, "is_encoder_decoder", True):
        return False
    named = any(part in _class_name(model) for part in ("CausalLM", "LMHeadModel"))
    return named or any(m.can_generate() for m in model.modules() if hasattr(type(m), "can_generate"))


def _shifted(model: nn.Module, batch: Batch, labels: Tensor) -> Tensor:
    return labels[:, 1:] if _shifts_labels(model, batch) else labels


def _token_loss(model: nn.Module, batch: Batch, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over an example's gold tokens: logits (B, T, V), labels (B, T) -> (B,)"""
    if _shifts_labels(model, batch):
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.mT.float(), labels, reduction="none", ignore_index=IGNORED)
    return losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)
