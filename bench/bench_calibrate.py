"""Conductance of every linear of MiniLM: one sweep beside captum, layer by layer. Same nodes, same numbers."""

from __future__ import annotations

import torch
from captum.attr import LayerConductance

from bench.timing import Comparison, compare
from bench.workload import batch, minilm
from cobra.batch import Batch
from cobra.conductance import attribute
from cobra.entry import find_entry
from cobra.objective import default_target
from cobra.path import path_rule
from cobra.sites import find_sites
from cobra.watch import frozen

POINTS = 50


def run(rounds: int = 1) -> list[Comparison]:
    model, inputs = minilm(), batch(1, 32)
    sites, whole = find_sites(model), Batch(inputs, 1)
    rule = path_rule("conductance", "midpoint", POINTS)
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()

    def forward(inputs_embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = model.bert(inputs_embeds=inputs_embeds, attention_mask=mask).last_hidden_state
        return model.classifier(hidden.mean(1))

    def sweep() -> torch.Tensor:
        with frozen(model):
            entry = find_entry(model, whole)
            return attribute(model, sites, entry, whole, rule, lambda outputs, b: default_target(model, outputs, b)).sites

    def layer_by_layer() -> torch.Tensor:
        with frozen(model):
            return torch.stack([_captum(forward, site.module, embeddings, inputs) for site in sites], 1)

    theirs, ours = layer_by_layer().double(), sweep()
    error = ((ours - theirs).abs() / theirs.abs().clamp(min=1e-3 * theirs.abs().max())).max().item()
    if error > 1e-4:
        raise AssertionError(f"the sweep differs from captum by {error:.1e}; no speed is reported for wrong numbers")
    name = f"conductance of {len(sites)} linears, {POINTS} points, 1 × 32 tokens"
    alternatives = {"one sweep": sweep, f"captum, {len(sites)} layers": layer_by_layer}
    return [compare(name, "one sweep", alternatives, max(3, rounds // 3), warmup=1)]


def _captum(forward, layer: torch.nn.Module, embeddings: torch.Tensor, inputs: dict) -> torch.Tensor:
    attributions = LayerConductance(forward, layer).attribute(
        embeddings,
        baselines=torch.zeros_like(embeddings),
        target=inputs["labels"],
        additional_forward_args=(inputs["attention_mask"],),
        n_steps=POINTS,
        method="riemann_middle",
    )
    return attributions.sum((1, 2))
