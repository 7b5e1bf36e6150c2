"""An adapter apart from its model: matrices by module name, with scaling and gates folded in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from cobra import distributed
from cobra.group import Group
from cobra.linear import CobraLinear
from cobra.lora import ARCHITECTURE, LoraAdapter, LoraLayer, class_name
from cobra.sites import Site

if TYPE_CHECKING:
    from cobra.adapter import Adapter


def to_lora(adapter: Adapter) -> LoraAdapter:
    """What `Adapter.to_lora` gives.

    Raises ValueError for a module that has several names, which a checkpoint cannot say. Warns of adapted modules that peft
    would take for heads.
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
    heads = _heads_of_peft(adapter)
    origin, kind = adapter.origin or LoraAdapter({}), _class_of(adapter.model)
    architecture = _architecture(origin, kind)
    path = getattr(getattr(adapter.model, "config", None), "_name_or_path", None) or None
    return LoraAdapter(
        layers=layers,
        heads={name: {k: distributed.whole(v) for k, v in head.state_dict().items()} for name, head in heads.items()},
        transposed=any(layer.transposed for group in adapter.groups for layer in group.all_layers),
        dropout=adapter.config.dropout,
        ambiguous=any(other.endswith(f".{name}") for other in order for name in layers),
        # from the path of a class that is not of transformers its Auto classes would make another model, without a word
        base_model=None if "." in (architecture or "") else path,
        task_type=origin.task_type,
        auto_mapping=_auto_mapping(kind),
        provenance={
            "fingerprint": adapter.base_fingerprint,
            "step": adapter.current_step,
            "config": adapter.config.to_dict(),
            "plan": None if adapter.plan is None else adapter.plan.to_dict(),
            "calibration": adapter.calibration,
            **({} if architecture is None else {ARCHITECTURE: architecture}),
        },
    )


def _heads_of_peft(adapter: Adapter) -> dict[str, nn.Module]:
    """The heads, and what peft takes for one too and wants from the file: modules whose names end as a head's does, even within
    a word (pre_classifier beside classifier)."""
    found, endings = dict(adapter.heads), tuple(adapter.heads)
    for name, module in adapter.model.named_modules():
        if not name.endswith(endings) or any(f"{name}.".startswith(f"{head}.") for head in found):
            continue
        if any(isinstance(part, CobraLinear) for part in module.modules()):
            head = next(ending for ending in endings if name.endswith(ending))
            warnings.warn(
                f"{name} ends as {head} does, which trains whole: peft takes both for modules_to_save and cannot load the "
                f"adapter of {name}; attach without {head} in modules_to_save or {name} in target_modules, or merge()",
                stacklevel=4,
            )
        elif module.state_dict():
            found[name] = module
    return found


def _class_of(model: nn.Module) -> type[nn.Module]:
    """The class it was built as: FSDP2 puts one of its own before it."""
    return next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed."))


def _auto_mapping(kind: type[nn.Module]) -> dict[str, str] | None:
    """What peft's AutoPeftModel classes make the base model with; they take transformers' own classes."""
    if not (kind.__module__.startswith("transformers.") and hasattr(kind, "from_pretrained")):
        return None
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def _architecture(origin: LoraAdapter, kind: type[nn.Module]) -> str | None:
    """The class on record, where there is one; the model's own where it was put on another."""
    recorded = origin.provenance.get(ARCHITECTURE)
    if recorded is None:
        return None
    names = [class_name(parent) for parent in kind.__mro__]
    return recorded if recorded in names else names[0]


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
