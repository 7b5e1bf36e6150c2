"""A plain LoRA checkpoint: adapter_config.json and adapter_model.safetensors, as peft and its readers take it.

Scaling and gates are folded into lora_B and every layer's alpha is its rank, so that a reader's alpha / r is 1. Layers of rank
0 have no entry. "compact" writes each layer at its own rank, with rank_pattern and alpha_pattern under full names; "padded"
writes every layer at the largest rank, with zeros, for engines that read one rank only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from cobra import storage

if TYPE_CHECKING:
    from cobra.adapter import Adapter
    from cobra.linear import CobraLinear

LAYOUTS = ("compact", "padded")
PREFIX = "base_model.model."


def save_pretrained(adapter: Adapter, folder: Path | str, layout: str = "compact") -> None:
    """Writes the folder, whole or not at all; an older one is replaced only by a complete one.

    Raises ValueError for an unknown layout, an adapter with no rank left, and a folder of another program's files.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not one of {', '.join(LAYOUTS)}")
    layers = {
        name: layer
        for group in adapter.groups
        for site, site_layers in zip(group.sites, group.layers, strict=True)
        for name, layer in _named_layers(site, site_layers)
    }
    for group in adapter.groups:
        for site in group.sites:
            if len(site.modules) > len(site.distinct_modules):
                names = " and ".join(name for name, _ in site.modules)
                raise ValueError(f"{names} are one module, and peft would adapt it under its first name only; merge() instead")
    if not layers:
        raise ValueError("the plan keeps no rank, and peft has no empty adapter; save the base model instead")
    _check_replaceable(Path(folder))
    largest = max(layer.rank for layer in layers.values())
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        lora_A, lora_B = layer.folded()
        padding = largest - layer.rank if layout == "padded" else 0
        tensors[f"{PREFIX}{name}.lora_A.weight"] = F.pad(lora_A, (0, 0, 0, padding))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = F.pad(lora_B, (0, padding))
    for name, head in adapter.heads.items():
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in head.state_dict().items()}
    ranks = {} if layout == "padded" else _rank_pattern({name: layer.rank for name, layer in layers.items()}, largest)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(adapter.model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": adapter.config.dropout,
        "bias": "none",
        "fan_in_fan_out": any(layer.transposed for layer in layers.values()),
        "target_modules": _targets(adapter.model, list(layers)),
        "modules_to_save": list(adapter.heads) or None,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
    }
    data = save({k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()}, {"format": "pt"})
    with storage.new_folder(folder) as fresh:
        storage.write_json(fresh / "adapter_config.json", config)
        storage.write_bytes(fresh / "adapter_model.safetensors", data)
        storage.write_json(fresh / "cobra.json", _provenance(adapter, layout))


def _named_layers(site, layers: list[CobraLinear]):
    """One name for each module peft will see: its first. Modules that share a weight get one copy of the adapter each."""
    by_module = dict(zip(map(id, site.distinct_modules), layers, strict=True))
    for name, module in site.modules:
        if id(module) in by_module:
            yield name, by_module.pop(id(module))


def _targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """The names; or an expression that matches them whole, where peft's endings would catch other modules too."""
    others = [name for name, _ in model.named_modules() if name not in names]
    if any(other.endswith(f".{name}") for other in others for name in names):
        return "|".join(map(re.escape, names))
    return names


def _rank_pattern(ranks: dict[str, int], largest: int) -> dict[str, int]:
    """The layers that are not of the largest rank. peft takes the first name that a layer's ends with: longer ones come first,
    and a layer is listed too if a shorter name would catch it."""
    small = {name for name, rank in ranks.items() if rank != largest}
    listed = [name for name in ranks if name in small or any(name.endswith(f".{other}") for other in small)]
    return {name: ranks[name] for name in sorted(listed, key=len, reverse=True)}


def _provenance(adapter: Adapter, layout: str) -> dict:
    return {
        "kind": "adapter provenance",
        "version": 1,
        "layout": layout,
        "fingerprint": adapter.base_fingerprint,
        "step": adapter.current_step,
        "config": adapter.config.to_dict(),
        "plan": None if adapter.plan is None else adapter.plan.to_dict(),
    }


def _check_replaceable(folder: Path) -> None:
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name a folder")
    ours = {"adapter_config.json", "adapter_model.safetensors", "cobra.json"}
    foreign = sorted(p.name for p in folder.iterdir() if p.name not in ours) if folder.is_dir() else []
    if foreign:
        raise ValueError(f"{folder} holds other files ({', '.join(foreign[:3])}); name a new folder, nothing was written")
