"""python -m bench.accuracy.starts: what a layer's input looks like along the rows that lora_A starts from.

Of every task one row in rows/starts.jsonl: the calibration of COBRA's form, and inputs of training examples that it has not
seen. For unit rows a along the gradient, and for uniform ones, it has the spread of a·x over tokens, the share of a·x that all
tokens have in common, which an update can only use as a bias, and ‖∇_W L a‖, the slope of the loss in lora_B.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.accuracy.machine import machine_name
from bench.accuracy.recipe import Recipe
from bench.accuracy.rows import ROWS
from bench.accuracy.run import calibrated, started
from bench.accuracy.searches import SEARCH_SEED
from cobra import storage
from cobra.sites import find_sites

FILE = "starts.jsonl"
TASKS = ("rt", "supersense", "tweets", "amazon")
DIRECTIONS = 4  # gates of a layer where the average rank is 2
EXAMPLES = 128
ALL = 4096  # directions: as many as a layer has
DRAWS = 64  # uniform rows of a layer


def row_of(task: str) -> dict:
    """Means over layers, and (name, spread ratio, cosine with the mean input) of each."""
    recipe = Recipe("ablation", task, "cobra", 2, 1e-3, SEARCH_SEED)
    start = started(task, None, recipe.examples, recipe.seed, 0.0, recipe.max_length, recipe.precision)
    path = recipe.calibration_examples, recipe.path_points, recipe.estimator, "site", ALL
    scores, _ = calibrated(start, *path)
    seen = len(start.batches(recipe.calibration_examples))
    inputs = _inputs(start.model(0.0).eval(), start.batches(recipe.calibration_examples + EXAMPLES)[seen:])
    found = {name: measure(x, scores.directions[name]) for name, x in inputs.items()}
    means = {key: round(sum(of[key] for of in found.values()) / len(found), 4) for key in next(iter(found.values()))}
    layers = [[name, round(of["spread"], 4), round(of["cosine"], 4)] for name, of in found.items()]
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"task": task, "seed": recipe.seed, **means, "layers": layers, "versions": versions, "machine": machine_name("cpu")}


def measure(x: Tensor, directions: Tensor) -> dict[str, float]:
    """x (T, K): inputs of a layer; directions (q, K), all of the gradient's, the strongest first.

    spread: standard deviation of a·x over tokens along the directions, root mean square, in that of uniform rows
    constant, constant_second, constant_uniform: E[a·x]² / E[(a·x)²] of the first direction, of the second, and of uniform rows
    cosine: of the first direction and the mean input
    slope: ‖G a‖ along the directions, root mean square, in that of uniform rows, G the mean gradient
    """
    gradient, directions = directions, directions[:DIRECTIONS]
    rows = F.normalize(directions, dim=1)
    drawn = F.normalize(torch.rand(DRAWS, x.shape[1], generator=torch.Generator().manual_seed(0)) * 2 - 1, dim=1)
    along, across = x @ rows.t(), x @ drawn.t()
    constant = _constant_share(along)
    return {
        "spread": (along.var(0).mean() / across.var(0).mean()).sqrt().item(),
        "constant": constant[0].item(),
        "constant_second": constant[1].item(),
        "constant_uniform": _constant_share(across).mean().item(),
        "cosine": F.cosine_similarity(rows[0], x.mean(0), dim=0).abs().item(),
        "slope": (directions.square().sum(1).mean() / gradient.square().sum() * x.shape[1]).sqrt().item(),
    }


def _constant_share(projected: Tensor) -> Tensor:
    return projected.mean(0).square() / projected.square().mean(0)


@torch.no_grad()
def _inputs(model: torch.nn.Module, batches: Sequence[dict]) -> dict[str, Tensor]:
    """Layer -> inputs (T, K) of all tokens that are not padding."""
    seen: dict[str, list[Tensor]] = {site.name: [] for site in find_sites(model)}
    for name, kept in seen.items():
        model.get_submodule(name).register_forward_hook(lambda module, given, output, kept=kept: kept.append(given[0]))
    for batch in batches:
        model(**batch)
    tokens = [batch["attention_mask"].bool() for batch in batches]
    return {name: torch.cat([x[on] for x, on in zip(kept, tokens, strict=True)]) for name, kept in seen.items()}


def read_rows(folder: Path = ROWS) -> list[dict]:
    path = folder / FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def markdown(rows: list[dict]) -> str:
    """A line a task."""
    lines = [
        "| task | spread of inputs along the gradient, in that along uniform rows | constant share, first direction / second / "
        "uniform rows | cosine of the first direction and the mean input | slope of the loss, in that along uniform rows |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        shares = " / ".join(f"{row[key]:.0%}" for key in ("constant", "constant_second", "constant_uniform"))
        lines.append(f"| {row['task']} | {row['spread']:.1f}× | {shares} | {row['cosine']:.2f} | {row['slope']:.0f}× |")
    return "\n".join(lines)


def main() -> None:
    rows = [row_of(task) for task in TASKS]
    storage.write_bytes(ROWS / FILE, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    print(markdown(rows))


if __name__ == "__main__":
    main()
