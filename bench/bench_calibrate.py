"""Conductance of every linear of MiniLM: one sweep beside captum, layer by layer. Same nodes, same numbers."""

from __future__ import annotations

import torch
from captum.attr import LayerConductance

from bench.workload import batch, minilm
from cobra.batch import Batch
from cobra.conductance import attribute
from cobra.entry import find_entry
from cobra.objective import default_target
from cobra.path import path_rule
from cobra.sites import find_sites
from cobra.timing import Comparison, compare
from cobra.watch import frozen

POINTS = 50


def run() -> list[Comparison]:
    return [_at(1, 32, rounds=1), _at(8, 64, rounds=1)]


def _at(rows: int, tokens: int, rounds: int) -> Comparison:
    model, inputs = minilm(), batch(rows, tokens)
    sites, whole = find_sites(model), Batch(inputs, rows)
    rule = path_rule("conductance", "midpoint", POINTS)
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    results: dict[str, torch.Tensor] = {}

    def forward(inputs_embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = model.bert(inputs_embeds=inputs_embeds, attention_mask=mask).last_hidden_state
        return model.classifier(hidden.mean(1))

    def sweep() -> None:
        def target(outputs: object, b: Batch) -> torch.Tensor:
            return default_target(model, outputs, b)

        with frozen(model):
            entry = find_entry(model, whole)
            results["sweep"] = attribute(model, sites, entry, whole, rule, target, max_rows=POINTS + 2).sites

    def layer_by_layer() -> None:
        sums = [_captum(forward, site.module, embeddings, inputs) for site in sites]
        results["captum"] = torch.stack(sums, 1).double()

    work = f"conductance of {len(sites)} linears, {POINTS} points, {rows} × {tokens} tokens"
    alternatives = {"one sweep": sweep, f"captum, {len(sites)} layers": layer_by_layer}
    sweep()
    comparison = compare(work, "one sweep", alternatives, rounds, warmup=0)
    scale = results["captum"].abs().amax(0)
    error = ((results["sweep"] - results["captum"]).abs().amax(0) / scale).max().item()
    if error > 1e-3:
        raise AssertionError(f"the sweep differs from captum by {error:.1e}; no speed is reported for wrong numbers")
    return comparison


def _captum(forward, layer: torch.nn.Module, embeddings: torch.Tensor, inputs: dict) -> torch.Tensor:
    attributions = LayerConductance(forward, layer).attribute(
        embeddings,
        baselines=torch.zeros_like(embeddings),
        target=inputs["labels"],
        additional_forward_args=(inputs["attention_mask"],),
        n_steps=POINTS,
        method="riemann_middle",
    )
    return attributions.detach().sum((1, 2))
