"""An adapter apart from its model: matrices by module name, with scaling and gates folded in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from cobra import distributed
from cobra.group import Group
from cobra.linear import CobraLinear
from cobra.lora import LoraAdapter, LoraLayer
from cobra.sites import Site

if TYPE_CHECKING:
    from cobra.adapter import Adapter


def to_lora(adapter: Adapter) -> LoraAdapter:
    """What `Adapter.to_lora` gives.

    Raises ValueError for a module that has several names, which a checkpoint cannot say.
    """
    layers: dict[str, LoraLayer] = {}
    for group in adapter.groups:
        for site, site_layers in zip(group.sites, group.layers, strict=True):
            layers |= {name: LoraLayer(*layer.folded()) for name, layer in _named_layers(site, site_layers)}
    for site in adapter.dropped:
        kind = {"device": site.weight.device, "dtype": torch.promote_types(site.weight.dtype, torch.float16)}
        nothing = LoraLayer(torch.empty(0, site.in_features, **kind), torch.empty(site.out_features, 0, **kind))
        layers |= {name: nothing for name, _ in site.modules}
    order = {name: i for i, (name, _) in enumerate(adapter.model.named_modules())}
    layers = dict(sorted(layers.items(), key=lambda item: order.get(item[0], len(order))))
    return LoraAdapter(
        layers=layers,
        heads={name: {k: distributed.whole(v) for k, v in head.state_dict().items()} for name, head in adapter.heads.items()},
        transposed=any(layer.transposed for group in adapter.groups for layer in group.all_layers),
        dropout=adapter.config.dropout,
        ambiguous=any(other.endswith(f".{name}") for other in order for name in layers),
        base_model=getattr(getattr(adapter.model, "config", None), "_name_or_path", None) or None,
        provenance={
            "fingerprint": adapter.base_fingerprint,
            "step": adapter.current_step,
            "config": adapter.config.to_dict(),
            "plan": None if adapter.plan is None else adapter.plan.to_dict(),
            "calibration": adapter.calibration,
        },
    )


def warn_of_shared_weights(groups: Sequence[Group], stacklevel: int) -> None:
    """A folder holds one copy of an update for each module, and peft's merge adds all of them."""
    for names in ([name for name, _ in site.modules] for group in groups for site in group.sites):
        if len(names) > 1:
            warnings.warn(
                f"{' and '.join(names)} share one weight: unmerged this adapter is right, but peft's merge_and_unload "
                "would add its update once for each; merge it with cobra.load_adapter(folder).attach(model).merge()",
                stacklevel=stacklevel,
            )


def _named_layers(site: Site, layers: list[CobraLinear]) -> Iterator[tuple[str, CobraLinear]]:
    """One name for each module; modules that share a weight get one copy of the adapter each."""
    if len(site.modules) > len(site.distinct_modules):
        names = " and ".join(name for name, _ in site.modules)
        raise ValueError(f"{names} are one module, and peft would adapt it under its first name only; merge() instead")
    return zip((name for name, _ in site.modules), layers, strict=True)
