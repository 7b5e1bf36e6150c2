"""Rows as the trainer writes them, with results that are drawn instead of trained."""

import json
import math
import zlib

import numpy as np

from bench.accuracy.metrics import SCALED, pack_per_example
from bench.accuracy.recipe import Recipe

KINDS = {"hyper": "classification", "topics": "classification", "foods": "regression", "gcide": "language"}


def row(
    method="lora",
    task="hyper",
    rank=2,
    seed=0,
    phase="final",
    level=0.8,
    lr=0.003,
    size=200,
    parameters=1000,
    seconds=10.0,
    diverged=False,
    **recipe,
) -> dict:
    """level: expected accuracy, or scale of the losses. The examples' difficulty is the task's, whatever the method."""
    made = Recipe(phase, task, method, rank, lr, seed, **recipe)
    if diverged:
        found = {"phase": phase, "kind": KINDS[task], "config": made.to_dict()}
        return {"key": made.key, **found, "diverged": "the loss of step 7 is nan"}
    kind = KINDS[task]
    hard = np.random.default_rng(zlib.crc32(task.encode())).uniform(size=size)
    drawn = np.random.default_rng(zlib.crc32(f"{task} {method} {rank} {seed} {lr}".encode())).uniform(size=size)
    mixed = 0.7 * hard + 0.3 * drawn
    # gains that are equal on all seeds are a case of their own
    moved = {1: 1, 2: -1}.get(seed, 0) * (phase == "final" and method != "lora") / size
    each = mixed < np.quantile(mixed, level + moved) if kind == "classification" else (level * mixed**2).astype(np.float32)
    metrics = _metrics(kind, each)
    scaled = {name: metrics[name.removeprefix("scaled_")] for name in SCALED} if kind == "classification" else {}
    return {
        "key": made.key,
        "phase": phase,
        "task": task,
        "kind": kind,
        "model": made.model,
        "method": method,
        "average_rank": rank,
        "seed": seed,
        "config": json.loads(json.dumps(made.to_dict())),
        "versions": {"torch": "2.13.0"},
        "machine": "x86_64, 1 threads",
        "seconds": {"head": 1.0, "calibrate": 4.0, "train": seconds, "evaluate": 2.0},
        "peak_memory_mb": 900,
        "trainable_parameters": parameters,
        "head_parameters": 100,
        "ranks": {"layer": rank},
        "train_loss": 0.5,
        "validation": metrics,
        "test": {**metrics, **scaled, "per_example": pack_per_example(each)} if phase == "final" else None,
    }


def _metrics(kind: str, each: np.ndarray) -> dict:
    mean = float(each.mean())
    if kind == "regression":
        return {"mse": mean, "mae": mean**0.5, "pearson": 0.5, "spearman": 0.4}
    if kind == "language":
        return {"nll": mean, "token_nll": mean, "perplexity": math.exp(mean)}
    return {"accuracy": mean, "macro_f1": mean, "mcc": mean - 0.2, "nll": 1.2 - mean, "ece": 0.05, "brier": 0.3}
