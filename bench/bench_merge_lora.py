"""Merging all adapters of MiniLM (36 sites, rank 8): beside a copy of the same weights, and beside peft."""

from __future__ import annotations

import copy

import peft
import torch

import cobra
from bench.timing import Comparison, compare
from bench.workload import minilm
from cobra.sites import find_sites


def run(rounds: int = 15) -> list[Comparison]:
    base = minilm()
    names = [site.name for site in find_sites(base)]
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    adapter = cobra.attach(ours, cobra.CobraConfig(rank_budget=8 * len(names), r_max=8, gate="open", modules_to_save=()))
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=8, target_modules=names))
    weights = [site.weight for site in find_sites(base)]
    copies = [torch.empty_like(w) for w in weights]

    def copy_weights() -> None:
        for target, source in zip(copies, weights, strict=True):
            target.copy_(source)

    def merge() -> None:
        adapter.merge()
        adapter.unmerge()

    def merge_peft() -> None:
        wrapped.merge_adapter()
        wrapped.unmerge_adapter()

    alternatives = {"copy of the weights": copy_weights, "cobra merge + unmerge": merge, "peft merge + unmerge": merge_peft}
    return [compare("merge and unmerge, MiniLM", "copy of the weights", alternatives, rounds)]
