"""A training step's forward and backward on MiniLM, all 36 linears adapted, batch 16 × 64: what an adapter adds."""

from __future__ import annotations

import copy
import dataclasses

import peft
import torch
from torch import Tensor, nn

import cobra
from bench.workload import batch, forward_backward, minilm
from cobra.sites import find_sites
from cobra.timing import Comparison, compare

FROZEN = "frozen model, gradient to the embeddings"


def run(rounds: int = 15) -> list[Comparison]:
    base, inputs = minilm(), batch(16, 64)
    names = [site.name for site in find_sites(base)]
    alternatives = {
        FROZEN: _frozen(base),
        "cobra LoRA r=8": _cobra(base, inputs, 8, "open"),
        "cobra LoRA r=8, q, k and v together": _cobra(base, inputs, 8, "open", share_inputs=True),
        "cobra LoRA r=16": _cobra(base, inputs, 16, "open"),
        "cobra gates r_max=16": _cobra(base, inputs, 16, "concrete"),
        "peft LoRA r=8": _peft(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules=names)),
        "peft LoRA r=16": _peft(base, peft.LoraConfig(r=16, lora_alpha=32, target_modules=names)),
        "peft AdaLoRA r=8": _peft(
            base, peft.AdaLoraConfig(init_r=8, target_r=4, total_step=1000, tinit=10, tfinal=10, target_modules=names)
        ),
    }
    for name in ("cobra LoRA r=8", "peft LoRA r=8"):
        alternatives[f"{name}, torch.compile"] = torch.compile(copy.deepcopy(alternatives[name]))
    steps = {name: forward_backward(model, inputs) for name, model in alternatives.items()}
    gated = {name: steps[name] for name in ("cobra LoRA r=16", "cobra gates r_max=16")}
    flops = 4 * inputs["input_ids"].numel() * sum(site.weight.numel() for site in find_sites(base))  # forward, input gradients
    return [
        compare("forward + backward, MiniLM 16 × 64", FROZEN, steps, rounds, amount=flops, unit="FLOP"),
        compare("forward + backward with gates", "cobra LoRA r=16", gated, 2 * rounds),
    ]


def _frozen(base: nn.Module) -> nn.Module:
    """Every weight frozen; the embeddings' output asks for a gradient, so that the backward runs through all layers."""
    model = copy.deepcopy(base).requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


def _cobra(base: nn.Module, inputs: dict[str, Tensor], rank: int, gate: str, share_inputs: bool = False) -> nn.Module:
    """After a first step, as of which layers may share their input."""
    model = copy.deepcopy(base)
    sites = len(find_sites(model))
    config = cobra.CobraConfig(rank_budget=8 * sites, r_max=rank, gate=gate, total_steps=1000, modules_to_save=())
    config = dataclasses.replace(config, share_inputs=share_inputs)
    adapter = cobra.attach(model, config)
    model(**inputs).loss.backward()
    model.zero_grad()
    adapter.step()
    return model


def _peft(base: nn.Module, config: peft.PeftConfig, **options) -> nn.Module:
    return peft.get_peft_model(copy.deepcopy(base), config, **options)
