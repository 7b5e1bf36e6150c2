"""Putting an adapter on a model."""

from __future__ import annotations

import zlib

import torch
from torch import nn

from cobra.adapter import Adapter, Group
from cobra.config import CobraConfig
from cobra.linear import CobraLinear
from cobra.prior import fuse, prior_logits
from cobra.scores import LayerScores
from cobra.sites import Site, block_of, find_sites, fingerprint, task_heads


def attach(model: nn.Module, config: CobraConfig, scores: LayerScores | None = None) -> Adapter:
    """Puts a CobraLinear in the place of every target layer, freezes the rest, and returns the handle to train it.

    The model's outputs do not change until lora_B moves. Every CobraLinear starts in training mode, whatever the mode of the
    model (which stays); `model.eval()` and `model.train()` switch them as usual.

    scores: of this very model; None gives every group the same prior. Layers that the calibration did not see used get no
        adapter.

    Raises ValueError for an adapter already attached, scores of another model or another granularity, a budget above
    capacity, unknown modules_to_save, and what `find_sites` raises; the model is then unchanged.
    """
    if any(isinstance(module, CobraLinear) for module in model.modules()):
        raise ValueError("an adapter is attached already; detach() or merge() it first")
    sites = find_sites(model, config.target_modules)
    if scores is not None:
        sites = _scored_sites(model, sites, config, scores)
    members: dict[str, list[Site]] = {}
    for site in sites:
        members.setdefault(block_of(site.name) if config.granularity == "block" else site.name, []).append(site)
    ranks = [min(config.r_max, *(min(s.in_features, s.out_features) for s in group)) for group in members.values()]
    _check_budget(config, ranks)
    priors = _priors(list(members), config, scores)
    heads = _heads(model, config, sites)

    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    model.requires_grad_(False)
    groups = [
        _attach_group(model, config, index, name, group, ranks[index], priors[index], config.scaling(len(members)))
        for index, (name, group) in enumerate(members.items())
    ]
    for head in heads.values():
        head.requires_grad_(True)
    return Adapter(model, config, groups, heads, trainable)


def _scored_sites(model: nn.Module, sites: list[Site], config: CobraConfig, scores: LayerScores) -> list[Site]:
    """The sites that have scores, after checking that the scores are this model's."""
    if scores.settings["granularity"] != config.granularity:
        raise ValueError(
            f"the scores have granularity {scores.settings['granularity']!r}, the config {config.granularity!r}; "
            "use one granularity for both"
        )
    known = {member for group in scores.members for member in group} | scores.unused.keys()
    missing = sorted(known - {name for name, _ in model.named_modules(remove_duplicate=False)})
    if missing:
        raise ValueError(f"the scores are of another model: this one has no layer {missing[0]!r} ({len(missing)} are missing)")
    found = fingerprint(find_sites(model, lambda name, module: name in known))
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


def _check_budget(config: CobraConfig, ranks: list[int]) -> None:
    capacity = sum(ranks)
    if config.rank_budget > capacity:
        raise ValueError(
            f"rank_budget={config.rank_budget} is above the capacity {capacity} of {len(ranks)} {config.granularity}s "
            f"with at most r_max={config.r_max} gates each; raise r_max or lower the budget"
        )


def _priors(names: list[str], config: CobraConfig, scores: LayerScores | None) -> list[float]:
    if scores is None:
        return [0.0] * len(names)
    row = {name: i for i, name in enumerate(scores.sites)}
    rows = [row[name] for name in names]
    pi = fuse(scores.conductance[rows], scores.gradient[rows], config.fusion)
    # in fp32, the logits' own precision, so that the KL starts at exactly 0
    return prior_logits(pi, config.gamma, config.prior_scale).float().tolist()


def _heads(model: nn.Module, config: CobraConfig, sites: list[Site]) -> dict[str, nn.Module]:
    """The modules trained whole."""
    adapted = {name for site in sites for name, _ in site.modules}
    if config.modules_to_save == "auto":
        adapted_modules = {id(module) for site in sites for _, module in site.modules}
        return {
            name: head
            for name, head in task_heads(model).items()
            if not any(id(part) in adapted_modules for part in head.modules())
        }
    wanted = config.modules_to_save
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    found: dict[str, nn.Module] = {}
    for ending in wanted:
        matches = {n: m for n, m in model.named_modules() if n == ending or n.endswith(f".{ending}")}
        if not matches:
            raise ValueError(f"modules_to_save: the model has no module {ending!r}")
        both = [a for a in adapted if any(a == n or a.startswith(f"{n}.") for n in matches)]
        if both:
            raise ValueError(f"modules_to_save and target_modules both name {sorted(both)[0]!r}; leave it out of one")
        found |= matches
    return found


def _attach_group(
    model: nn.Module,
    config: CobraConfig,
    index: int,
    name: str,
    sites: list[Site],
    rank: int,
    prior: float,
    scaling: float,
) -> Group:
    layers: list[list[CobraLinear]] = []
    for site in sites:
        first = CobraLinear.from_linear(
            site.module,
            rank,
            scaling=scaling,
            dropout=config.dropout,
            gate_logit=None if config.gate == "open" else prior,
            generator=_generator(config.seed, site.name),
        )
        if layers:
            first.lora_gate = layers[0][0].lora_gate
        adapted = {id(site.module): first}
        for module_name, module in site.modules:
            if id(module) not in adapted:
                adapted[id(module)] = CobraLinear.sharing(module, first)
            model.set_submodule(module_name, adapted[id(module)])
        layers.append(list(adapted.values()))
    return Group(name, index, sites, layers, prior)


def _generator(seed: int, site: str) -> torch.Generator:
    """One stream a layer, whatever other layers are adapted."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {site}".encode()))  # torch reads 32 bits of a CPU seed
