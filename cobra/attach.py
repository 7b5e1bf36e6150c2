"""Putting an adapter on a model."""

from __future__ import annotations

import math
import warnings
import zlib

import torch
from torch import nn

from cobra.adapter import Adapter
from cobra.budget import Budget, allocate
from cobra.config import CobraConfig
from cobra.group import Group, cost_of_rank
from cobra.heads import check_trainable, head_of_adapter, heads_to_train, warn_of_tied_heads
from cobra.linear import HARD_STRETCH, CobraLinear, share_hooks
from cobra.lora import LoraAdapter, LoraLayer, check_forward, check_layer, check_names
from cobra.prior import fuse
from cobra.scores import LayerScores
from cobra.sites import (
    Site,
    blocks_of,
    find_sites,
    fingerprint,
    is_linear,
    is_quantised_linear,
    linear_names,
    refuse_peft_layers,
)
from cobra.starts import directions_to_start_from, prior_of_gates, start_from


@torch.inference_mode(False)  # parameters made in it could not be trained
def attach(model: nn.Module, config: CobraConfig, scores: LayerScores | None = None) -> Adapter:
    """Puts a CobraLinear in the place of every target layer, freezes the rest, and returns the handle to train it.

    The model's outputs do not change until lora_B moves; hooks on the layers go on running. Every CobraLinear starts in
    training mode, whatever the mode of the model (which stays); `model.eval()` and `model.train()` switch them as usual.

    scores: of this very model; None gives every group the same prior. Layers that the calibration did not see used get no
        adapter.

    Raises ValueError for an adapter already attached, scores of another model or another granularity, a budget above
    capacity or below the cheapest rank, offloaded weights, unknown or quantised modules_to_save, and what `find_sites` raises;
    the model is then unchanged.
    Warns of a module trained whole that shares a weight with another one.
    """
    _check_free(model)
    sites = find_sites(model, config.target_modules, allow_quantised=True)
    if scores is not None:
        sites = _scored_sites(model, sites, config, scores)
    members = _groups(model, sites, config, scores)
    _check_backend(sites, config)
    _check_held(sites)
    ranks = [min(config.r_max, *(min(s.in_features, s.out_features) for s in group)) for group in members.values()]
    budget = Budget.of(config.rank_budget)
    trained_as = torch.promote_types(sites[0].weight.dtype, torch.float32)
    costs = [cost_of_rank(group, budget.unit, trained_as.itemsize) for group in members.values()]
    # says now what extract() would say later
    allocation = allocate(list(members), [torch.ones(rank) for rank in ranks], costs, budget)
    if budget.amount and not allocation.spent:
        raise ValueError(f"a budget of {budget.amount} {budget.unit} keeps no rank: the cheapest step costs {allocation.step}")
    if isinstance(config.rank_budget, int) and 0 < budget.amount < len(members):
        of = "block" if config.granularity == "block" else "layer"
        warnings.warn(
            f"rank_budget={budget.amount} is the total over {len(members)} {of}s; {budget.amount} a {of} would be "
            f"{budget.amount * len(members)}. Where fewer than one a {of} is meant, cobra.Budget({budget.amount}) says so",
            stacklevel=3,  # the decorator's frame is between
        )
    priors = prior_of_gates(members, ranks, config, scores)
    starts = directions_to_start_from(sites, config, scores)
    heads = heads_to_train(model, config, sites)
    check_trainable(heads)
    warn_of_tied_heads(model, heads)

    average_rank = budget.amount / (len(members) if budget.unit == "ranks" else sum(costs))
    cut = sum(map(math.prod, zip(ranks, costs, strict=True))) > allocation.spent
    config, scaling = config.resolved(average_rank, cut=cut), config.scaling(average_rank)

    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    model.requires_grad_(False)
    groups = [
        _attach_group(model, config, index, name, group, priors[index], scaling, starts)
        for index, (name, group) in enumerate(members.items())
    ]
    for head in heads.values():
        head.requires_grad_(True)
    return Adapter(model, config, groups, heads, trainable, _calibration(scores, config))


@torch.inference_mode(False)  # as in attach
def attach_lora(model: nn.Module, lora: LoraAdapter) -> Adapter:
    """Puts an adapter's matrices on its base model, all gates open and the scale 1 (it is in lora_B); heads are loaded.

    Its layers have the mode of those that they replace: dropout is for training.

    Raises ValueError for an adapter already attached, layers or heads that the model lacks or has in another shape, layers with
    a forward of their own, and modules of which it holds one of several names; the model is then unchanged.
    """
    _check_free(model)
    layers = {name: layer for name, layer in lora.layers.items() if layer.rank}
    if not layers:
        raise ValueError("the adapter has no layer with a rank: there is nothing to attach")
    for name, layer in layers.items():
        check_layer(model, name, layer)
        check_forward(model, name)
    check_names(model, layers)
    heads = {name: head_of_adapter(model, name, state) for name, state in lora.heads.items()}
    check_trainable(heads)
    sites = find_sites(model, lambda name, module: name in layers, allow_quantised=True)
    _check_held(sites)
    for site in sites:
        _check_one_update(site, layers)

    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    model.requires_grad_(False)
    for name, head in heads.items():
        head.load_state_dict(lora.heads[name])
        head.requires_grad_(True)
    total, largest = sum(layer.rank for layer in layers.values()), max(layer.rank for layer in layers.values())
    config = CobraConfig(
        rank_budget=total,
        r_max=min(largest, 1024),
        gate="open",
        basis="singular",  # there are no gates to tell ranks apart by
        dropout=lora.dropout,
        target_modules=tuple(site.name for site in sites),
        modules_to_save=tuple(heads),
    )
    groups = [
        Group(
            site.name,
            i,
            [site],
            [_replace(model, site, CobraLinear.from_lora(site.module, layers[site.name], lora.dropout), site.module.training)],
            (0.0,) * layers[site.name].rank,
        )
        for i, site in enumerate(sites)
    ]
    adapter = Adapter(model, config, groups, heads, trainable, lora.provenance.get("calibration"))
    adapter.dropped = _without_rank(model, lora)
    return adapter


def _without_rank(model: nn.Module, lora: LoraAdapter) -> list[Site]:
    """Layers that the adapter has at rank 0: saved padded, they come back as the zeros that some engines want."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return [
        Site(name, ((name, modules[name]),), layer.in_features, layer.out_features)
        for name, layer in lora.layers.items()
        if not layer.rank and name in modules and (is_linear(modules[name]) or is_quantised_linear(modules[name]))
    ]


def _check_free(model: nn.Module) -> None:
    if any(isinstance(module, CobraLinear) for module in model.modules()):
        raise ValueError("an adapter is attached already; detach() or merge() it first")
    refuse_peft_layers(model)


def _check_backend(sites: list[Site], config: CobraConfig) -> None:
    held = [site.name for site in sites if is_quantised_linear(site.module)]
    if config.backend == "triton" and held:
        raise ValueError(
            f"{held[0]}: backend='triton' reads the weight itself, and {len(held)} target layers are quantised; "
            "set backend='auto', or target other layers"
        )


def _check_held(sites: list[Site]) -> None:
    away = [site.name for site in sites if site.module.weight.is_meta]
    if away:
        raise ValueError(
            f"{away[0]}.weight is on the meta device ({len(away)} layers): its values are not in memory, as where accelerate "
            "offloads a model; load it whole, or leave these layers out with target_modules"
        )


def _check_one_update(site: Site, layers: dict[str, LoraLayer]) -> None:
    """Modules that share a weight can have one update only."""
    first = layers[site.name]
    for name, _ in site.modules[1:]:
        other = layers[name]
        if other.rank != first.rank or not (
            torch.equal(other.lora_A, first.lora_A) and torch.equal(other.lora_B, first.lora_B)
        ):
            raise ValueError(f"{site.name} and {name} share one weight here, and the adapter holds different updates for them")


def _calibration(scores: LayerScores | None, config: CobraConfig) -> dict | None:
    """What a reader of the adapter wants to know of the scores behind it."""
    if scores is None:
        return None
    prior = fuse(scores.conductance, scores.gradient, config.fusion).tolist()
    return {
        "fingerprint": scores.fingerprint,
        "settings": scores.settings,
        "prior": dict(zip(scores.sites, prior, strict=True)),
    }


def _scored_sites(model: nn.Module, sites: list[Site], config: CobraConfig, scores: LayerScores) -> list[Site]:
    """The sites that have scores, after checking that the scores are this model's."""
    if scores.settings["granularity"] != config.granularity:
        raise ValueError(
            f"the scores have granularity {scores.settings['granularity']!r}, the config {config.granularity!r}; "
            "use one granularity for both"
        )
    known = {member for group in scores.members for member in group} | scores.unused.keys()
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = sorted(known - modules.keys())
    if missing:
        raise ValueError(f"the scores are of another model: this one has no layer {missing[0]!r} ({len(missing)} are missing)")
    # scores know a weight by the first of the layers that share it
    weights = {id(weight): weight for name in known if (weight := getattr(modules[name], "weight", None)) is not None}
    scored = find_sites(
        model, lambda name, module: name in known or id(getattr(module, "weight", None)) in weights, allow_quantised=True
    )
    found = fingerprint(scored)
    if found != scores.fingerprint:
        raise ValueError(
            f"the scores are of another model: their fingerprint is {scores.fingerprint}, this model's {found}; "
            "calibrate this model"
        )
    unscored = [site.name for site in sites if site.name not in known]
    if unscored:
        raise ValueError(
            f"the scores lack {len(unscored)} of the target layers, e.g. {unscored[0]!r}; "
            "calibrate with the same target_modules"
        )
    used = [site for site in sites if site.name not in scores.unused]
    if not used:
        raise ValueError("the calibration saw none of the target layers used")
    return used


def _groups(model: nn.Module, sites: list[Site], config: CobraConfig, scores: LayerScores | None) -> dict[str, list[Site]]:
    """Sites that share gates, by the name of their group: as the scores have it, or else by the sites' own names."""
    if config.granularity == "site":
        return {site.name: [site] for site in sites}
    if scores is None:
        block = blocks_of((site.name for site in sites), linear_names(model))
    else:
        block = {member: name for name, members in zip(scores.sites, scores.members, strict=True) for member in members}
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(block[site.name], []).append(site)
    return groups


def _attach_group(
    model: nn.Module,
    config: CobraConfig,
    index: int,
    name: str,
    sites: list[Site],
    prior: tuple[float, ...],
    scaling: float,
    starts: dict[str, torch.Tensor],
) -> Group:
    layers: list[list[CobraLinear]] = []
    for site in sites:
        first = CobraLinear.from_linear(
            site.module,
            len(prior),
            scaling=scaling,
            dropout=config.dropout,
            gate_logit=None if config.gate == "open" else prior,
            generator=_generator(config.seed, site.name),
        )
        first.straight_through, first.backend = config.gate == "straight_through", config.backend
        first.stretch = HARD_STRETCH if config.gate == "hard_concrete" else None
        if site.name in starts:
            start_from(first, starts[site.name], config.init_scale)
        if layers:
            first.lora_gate = layers[0][0].lora_gate
        layers.append(_replace(model, site, first))
    return Group(name, index, sites, layers, prior)


def _replace(model: nn.Module, site: Site, first: CobraLinear, training: bool = True) -> list[CobraLinear]:
    """Puts the layer, and one like it for every other module of the weight, into the model, in this mode."""
    adapted = {id(site.module): first}
    for name, module in site.modules:
        if id(module) not in adapted:
            adapted[id(module)] = CobraLinear.sharing(module, first)
        share_hooks(adapted[id(module)], module)
        adapted[id(module)].training = training  # of this module alone: a quantised layer within keeps its own
        model.set_submodule(name, adapted[id(module)])
    return list(adapted.values())


def _generator(seed: int, site: str) -> torch.Generator:
    """One stream a layer, whatever other layers are adapted."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {site}".encode()))  # torch reads 32 bits of a CPU seed
