"""Per-example gradient norms of every linear of MiniLM: one batched backward beside a loop of single-example backwards."""

from __future__ import annotations

import torch

from bench.workload import batch, minilm
from cobra.batch import Batch
from cobra.entry import find_entry
from cobra.gradient import gradient_norms
from cobra.objective import default_loss
from cobra.sites import find_sites
from cobra.timing import Comparison, compare
from cobra.watch import frozen


def run(rounds: int = 9) -> list[Comparison]:
    return [_at(rows, tokens, rounds) for rows, tokens in ((16, 16), (16, 64))]


def _at(rows: int, tokens: int, rounds: int) -> Comparison:
    model, inputs = minilm(), batch(rows, tokens)
    sites, whole = find_sites(model), Batch(inputs, rows)
    weights = [site.module.weight for site in sites]

    def batched() -> torch.Tensor:
        with frozen(model):
            entry = find_entry(model, whole)
            return gradient_norms(model, sites, entry, whole, lambda outputs, b: default_loss(model, outputs, b)).squared

    def loop() -> torch.Tensor:
        norms = []
        for i in range(rows):
            loss = model(**{k: v[i : i + 1] for k, v in inputs.items()}).loss
            norms.append(torch.stack([g.square().sum() for g in torch.autograd.grad(loss, weights)]))
        return torch.stack(norms)

    def frozen_pass() -> None:
        """What no per-example norm can do without."""
        with frozen(model), find_entry(model, whole).at(whole, None, lambda x: None) as entered:
            entered.forward(model).loss.backward()

    torch.testing.assert_close(batched().float(), loop(), rtol=1e-3, atol=1e-9)
    alternatives = {
        "one batched backward": batched,
        "frozen model, gradient to the embeddings": frozen_pass,
        f"{rows} single backwards": loop,
    }
    return compare(f"per-example gradient norms, {rows} × {tokens}", "one batched backward", alternatives, rounds)
