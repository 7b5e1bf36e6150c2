"""Metrics of predictions, and the packed result of every test example that paired tests need."""

from __future__ import annotations

import base64
import binascii
import math
import warnings

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional import mean_absolute_error, mean_squared_error, pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
)

ECE_BINS = 15
SCALED = {"scaled_nll": "NLL", "scaled_ece": "ECE", "scaled_brier": "Brier"}  # at a temperature that fits validation


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, macro F1, Matthews' correlation, NLL, ECE of 15 equal-width bins, and Brier score.

    logits: (n, classes); labels: (n,) class indices
    brier: squared distance of probabilities and one-hot label, summed over classes, averaged over examples (0 to 2)
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, not (examples, classes) with 2 classes or more")
    _check(logits, labels, "logits")
    classes = logits.shape[1]
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must be integers in 0..{classes - 1}; they are {labels.dtype} up to {labels.max().item()}")
    logits = logits.double()
    probabilities, predicted = logits.softmax(1), logits.argmax(1)
    return {
        "accuracy": multiclass_accuracy(predicted, labels, classes, average="micro").item(),
        "macro_f1": multiclass_f1_score(predicted, labels, classes, average="macro").item(),
        "mcc": multiclass_matthews_corrcoef(predicted, labels, classes).item(),
        "nll": F.cross_entropy(logits, labels).item(),
        "ece": multiclass_calibration_error(probabilities, labels, classes, n_bins=ECE_BINS, norm="l1").item(),
        "brier": (probabilities - F.one_hot(labels, classes)).square().sum(1).mean().item(),
    }


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """What logits are divided by for the lowest NLL (Guo et al. 2017, section 4.2), from 1/20 to 20.

    logits: (n, classes) of examples that no result is reported on; labels: (n,)
    """
    logits, bound = logits.double(), math.log(20)

    def nll(log_temperature: float) -> float:
        return F.cross_entropy(logits / math.exp(log_temperature), labels).item()

    return math.exp(minimize_scalar(nll, bounds=(-bound, bound), method="bounded").x)


def regression_metrics(predictions: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean squared and absolute error, Pearson's and Spearman's correlation (0 where predictions or labels are constant).

    predictions, labels: (n,)
    """
    if predictions.ndim != 1:
        raise ValueError(f"predictions have shape {tuple(predictions.shape)}, not (examples,)")
    _check(predictions, labels, "predictions")
    predictions, labels = predictions.double(), labels.double()
    constant = bool((predictions == predictions[0]).all() or (labels == labels[0]).all())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The variance of predictions or target is close to zero")
        correlations = {
            "pearson": 0.0 if constant else pearson_corrcoef(predictions, labels).item(),
            "spearman": 0.0 if constant else spearman_corrcoef(predictions, labels).item(),
        }
    return {
        "mse": mean_squared_error(predictions, labels).item(),
        "mae": mean_absolute_error(predictions, labels).item(),
        **correlations,
    }


def language_metrics(losses: Tensor, tokens: Tensor) -> dict[str, float]:
    """NLL a token averaged over texts, which paired tests compare; the same over all tokens, and the perplexity of that.

    losses: (n,) NLL summed over the tokens of a text that count; tokens: (n,) their number
    """
    if losses.ndim != 1:
        raise ValueError(f"losses have shape {tuple(losses.shape)}, not (texts,)")
    _check(losses, tokens, "losses")
    if tokens.min() < 1:
        raise ValueError(f"text {int(tokens.argmin())} has no token that counts; leave it out, or allow longer texts")
    over_tokens = losses.double().sum() / tokens.sum()
    return {
        "nll": (losses.double() / tokens).mean().item(),
        "token_nll": over_tokens.item(),
        "perplexity": over_tokens.exp().item(),
    }


def pack_per_example(values: np.ndarray | Tensor) -> str:
    """`bits:n:base64` of correctness, `float32:n:base64` of squared errors (or another loss ≥ 0).

    values: (n,) booleans or floats, in the order of the test split
    """
    values = np.asarray(values)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"per-example values have shape {values.shape}, not (examples,) with an example or more")
    if values.dtype == np.bool_:
        return f"bits:{len(values)}:{base64.b64encode(np.packbits(values).tobytes()).decode()}"
    if values.dtype.kind != "f":
        raise ValueError(f"per-example values are {values.dtype}; give booleans (correct or not) or floats (squared errors)")
    with np.errstate(over="ignore"):
        stored = values.astype("<f4")
    if not np.isfinite(stored).all() or (stored < 0).any():
        raise ValueError(f"per-example losses must be finite and ≥ 0 in float32; example {_first_bad(stored)} is not")
    return f"float32:{len(values)}:{base64.b64encode(stored.tobytes()).decode()}"


def unpack_per_example(packed: str) -> np.ndarray:
    """(n,) booleans or float32 losses, as they were packed."""
    kind, _, rest = packed.partition(":")
    number, _, text = rest.partition(":")
    if kind not in ("bits", "float32") or not number.isdecimal():
        raise ValueError(f"per-example string starts with {packed[:20]!r}, not bits:n: or float32:n:")
    count = int(number)
    size = -(-count // 8) if kind == "bits" else 4 * count
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"per-example string {packed[:20]!r}… is not base64: {error}") from error
    if len(data) != size:
        raise ValueError(f"per-example string {packed[:20]!r}… holds {len(data)} bytes; {count} examples need {size}")
    if kind == "bits":
        return np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(bool)
    values = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"per-example loss {_first_bad(values)} of {packed[:20]!r}… is not finite")
    return values


def _check(predicted: Tensor, labels: Tensor, name: str) -> None:
    if labels.shape != predicted.shape[:1] or not len(labels):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; {name} of {len(predicted)} examples need ({len(predicted)},)"
        )
    if not torch.isfinite(predicted).all() or not torch.isfinite(labels).all():
        raise ValueError(f"{name} or labels hold NaN or infinity; the run diverged and has no metrics")


def _first_bad(values: np.ndarray) -> int:
    return int(np.flatnonzero(~np.isfinite(values) | (values < 0))[0])
