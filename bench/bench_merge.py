"""What a merged model costs at inference: the same as the model it came from."""

from __future__ import annotations

import copy

import torch

import cobra
from bench.workload import batch, minilm
from cobra.timing import Comparison, compare


def run(rounds: int = 30) -> list[Comparison]:
    base, inputs = minilm(), batch(16, 64)
    untouched = copy.deepcopy(base)
    adapter = cobra.attach(base, cobra.CobraConfig(rank_budget=8 * 36, r_max=16, gate="mean", modules_to_save=()))
    with torch.no_grad():
        for tensor in adapter.state_dict().values():
            tensor.add_(0.01 * torch.randn_like(tensor))
    adapter.apply(adapter.extract())
    unmerged = copy.deepcopy(base)
    adapter.merge()
    if [type(m) for m in base.modules()] != [type(m) for m in untouched.modules()]:
        raise AssertionError("the merged model has other modules than the base model")

    def forward(model: torch.nn.Module):
        @torch.no_grad()
        def call() -> None:
            model(**inputs)

        return call

    alternatives = {"untouched model": forward(untouched), "merged": forward(base), "unmerged": forward(unmerged)}
    return [compare("inference, MiniLM 16 × 64, average rank 8", "untouched model", alternatives, rounds)]
