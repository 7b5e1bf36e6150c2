"""Merging: the kernel on MiniLM (36 sites) beside a copy of the weights, whole models beside peft."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence

import peft
import torch
from torch import Tensor, nn

import cobra
from bench.workload import minilm, smollm2
from cobra.sites import find_sites
from cobra.timing import Comparison, Timing, compare
from cobra_kernels.merge_lora import MergeItem, merge_lora, merge_lora_group
from cobra_kernels.testing import assert_within_budget

COPY = "copy of the weights"
RANK, SCALING = 8, 2.0


def make_items(weights: Sequence[Tensor], ranks: Sequence[int], dtype: torch.dtype) -> list[MergeItem]:
    """Random factors of a fine-tune's size in fp32."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for weight, r in zip(weights, ranks, strict=True):
        N, K = weight.shape
        lora_A, lora_B = torch.randn(r, K, generator=generator) / K**0.5, torch.randn(N, r, generator=generator) / 100
        items.append(MergeItem(weight.detach().to(dtype), lora_A, lora_B))
    return items


def kernel(weights: Sequence[Tensor], ranks: Sequence[int], label: str, dtype: torch.dtype, rounds: int) -> Comparison:
    """All sites in one call, into memory that is there and into new memory."""
    items = make_items(weights, ranks, dtype)
    targets = [torch.empty_like(item.weight) for item in items]

    def copy_weights() -> None:
        for target, item in zip(targets, items, strict=True):
            target.copy_(item.weight)

    def merge_each() -> list[Tensor]:
        return [merge_lora(item.weight, item.lora_A, item.lora_B) for item in items]

    oracle = [item.weight.double() + item.lora_B.double() @ item.lora_A.double() for item in items]
    assert_within_budget(merge_lora_group(items, out=targets)[0], merge_each(), oracle)
    alternatives = {
        COPY: copy_weights,
        "clone of the weights": lambda: [item.weight.clone() for item in items],
        "cobra, one call": lambda: merge_lora_group(items, out=targets),
        "cobra, one call, no statistics": lambda: merge_lora_group(items, out=targets, statistics=False),
        "cobra, one call, new tensors": lambda: merge_lora_group(items),
        "torch.addmm, a site at a time": merge_each,
    }
    name = str(dtype).removeprefix("torch.")
    moved = 2 * sum(item.weight.numel() * item.weight.element_size() for item in items)
    return compare(f"merge of {len(items)} MiniLM weights, {label}, {name}", COPY, alternatives, rounds, amount=moved, unit="B")


def adapted(base: nn.Module) -> cobra.Adapter:
    """COBRA's adapter on a copy of the model, the same one at every call."""
    names = [site.name for site in find_sites(base)]
    config = cobra.CobraConfig(rank_budget=RANK * len(names), r_max=RANK, gate="open", alpha=SCALING * RANK, modules_to_save=())
    adapter = cobra.attach(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in names:
            adapter.model.get_submodule(name).lora_B.normal_(std=0.01, generator=generator)
    return adapter


def adapted_by_peft(base: nn.Module, adapter: cobra.Adapter) -> nn.Module:
    """peft's LoRA on a copy of the model, with the same factors."""
    names = [site.name for site in find_sites(base)]
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=names))
    with torch.no_grad():
        for name in names:
            layer, theirs = adapter.model.get_submodule(name), wrapped.base_model.model.get_submodule(name)
            theirs.lora_A["default"].weight.copy_(layer.lora_A)
            theirs.lora_B["default"].weight.copy_(layer.lora_B)
    return wrapped


def validate(base: nn.Module, adapter: cobra.Adapter, wrapped: nn.Module) -> None:
    """Both merge to the same weights, and COBRA back to the same bits."""
    weights = {site.name: site.weight for site in find_sites(base)}
    merged = copy.deepcopy(wrapped).merge_and_unload()
    adapter.merge()
    for name in weights:
        torch.testing.assert_close(adapter.model.get_submodule(name).weight, merged.get_submodule(name).weight)
    adapter.unmerge()
    for name, weight in weights.items():
        if not torch.equal(adapter.model.get_submodule(name).weight, weight):
            raise AssertionError(f"{name}: unmerge left other bits")


def compare_prepared(work: str, alternatives: dict[str, tuple[Callable, Callable]], rounds: int, warmup: int = 2) -> Comparison:
    """Times run(prepare()) of each pair (prepare, run) once a round, without the preparation."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for i in range(warmup + rounds):
        for name, (prepare, run) in alternatives.items():
            prepared = prepare()
            start = time.perf_counter()
            run(prepared)
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return Comparison(work, COPY, tuple(Timing(n, tuple(s)) for n, s in seconds.items()))


def whole_model(base: nn.Module, label: str, rounds: int) -> Comparison:
    adapter = adapted(base)
    wrapped = adapted_by_peft(base, adapter)
    validate(base, adapter, wrapped)
    weights = [site.weight for site in find_sites(base)]
    copies = [torch.empty_like(w) for w in weights]

    def copy_weights(_: object) -> None:
        for target, source in zip(copies, weights, strict=True):
            target.copy_(source)

    def nothing() -> None:
        pass

    alternatives = {
        COPY: (nothing, copy_weights),
        "copy of the weights into new memory": (nothing, lambda _: [w.clone() for w in weights]),
        "cobra merge in place": (lambda: adapted(base), lambda fresh: fresh.merge(reversible=False)),
        "cobra merge": (nothing, lambda _: adapter.merge()),
        "cobra unmerge": (nothing, lambda _: adapter.unmerge()),  # of the line above
        "peft merge_and_unload": (lambda: copy.deepcopy(wrapped), lambda model: model.merge_and_unload()),
    }
    return compare_prepared(f"merge of a whole model, {label}, r={RANK}", alternatives, rounds)


def run(rounds: int = 11) -> list[Comparison]:
    base = minilm()
    weights = [site.weight for site in find_sites(base)]
    uneven = torch.linspace(0, 16, len(weights)).round().int()[torch.randperm(len(weights))].tolist()
    ranks = {"r=8": [8] * len(weights), "r=16": [16] * len(weights), "r=0 to 16": uneven}
    kernels = [
        kernel(weights, ranks[label], label, dtype, rounds) for dtype in (torch.float32, torch.bfloat16) for label in ranks
    ]
    return [*kernels, whole_model(base, "MiniLM", rounds), whole_model(smollm2(), "SmolLM2", rounds)]
