"""A plain LoRA checkpoint: adapter_config.json and adapter_model.safetensors, as peft and its readers take it.

Scaling and gates are folded into lora_B and every layer's alpha is its rank, so that a reader's alpha / r is 1. "compact"
writes each layer at its own rank, with rank_pattern and alpha_pattern under full names, and leaves out layers of rank 0;
"padded" writes every layer at the largest rank, with zeros, for engines that read one rank only.
"""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from cobra import storage
from cobra.export.card import model_card
from cobra.export.folder import CONFIG, PREFIX, TENSORS
from cobra.lora import LoraAdapter

LAYOUTS = ("compact", "padded")

# as they are moved into a folder that stays: no README without what says that it is ours, and last what makes it an adapter's
FILES = ("cobra.json", "README.md", TENSORS, CONFIG)


def save_pretrained(adapter: LoraAdapter, folder: Path | str, layout: str = "compact") -> None:
    """Writes the folder, whole or not at all; an older one is replaced only by a complete one. What holds for a mount point and
    the current directory, which stay: `cobra.storage.new_folder`.

    Raises ValueError for an unknown layout, an adapter with no rank left or that is not finite, and a folder of another
    program's files.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not one of {', '.join(LAYOUTS)}")
    if not any(adapter.ranks.values()):
        raise ValueError("the plan keeps no rank, and peft has no empty adapter; save the base model instead")
    _check_replaceable(Path(folder))
    config, tensors = _config(adapter, layout), _tensors(adapter, layout)
    storage.check_finite(folder, tensors)
    data = save({k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()}, {"format": "pt"})
    provenance = {"kind": "adapter provenance", "version": 1, **adapter.provenance, "layout": layout}
    with storage.new_folder(folder, FILES) as fresh:
        storage.write_json(fresh / CONFIG, config)
        storage.write_bytes(fresh / TENSORS, data)
        storage.write_json(fresh / "cobra.json", provenance)
        storage.write_bytes(fresh / "README.md", model_card(adapter, layout).encode())


def rank_pattern(ranks: dict[str, int], largest: int) -> dict[str, int]:
    """The layers that are not of the largest rank. peft takes the first name that a layer's ends with: longer ones come first,
    and a layer is listed too if a shorter name would catch it."""
    small = {name for name, rank in ranks.items() if rank != largest}
    listed = [name for name in ranks if name in small or any(name.endswith(f".{other}") for other in small)]
    return {_as_pattern(name): ranks[name] for name in sorted(listed, key=len, reverse=True)}


def _as_pattern(name: str) -> str:
    """Keys are expressions. Dots match themselves and stay as they are, since some readers want plain names."""
    return name if re.fullmatch(r"[\w.-]+", name) else re.escape(name)


def _config(adapter: LoraAdapter, layout: str) -> dict:
    ranks = {name: rank for name, rank in adapter.ranks.items() if rank or layout == "padded"}
    largest = max(ranks.values())
    pattern = {} if layout == "padded" else rank_pattern(ranks, largest)
    # as in peft, which reads it where there is no task type
    auto = {} if adapter.task_type or not adapter.auto_mapping else {"auto_mapping": adapter.auto_mapping}
    return {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        **auto,
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": adapter.dropout,
        "bias": "none",
        "fan_in_fan_out": adapter.transposed,
        "target_modules": "|".join(map(re.escape, ranks)) if adapter.ambiguous else list(ranks),
        "modules_to_save": list(adapter.heads) or None,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }


def _tensors(adapter: LoraAdapter, layout: str) -> dict[str, Tensor]:
    largest = max(adapter.ranks.values())
    tensors: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        if layout == "compact" and not layer.rank:
            continue
        padding = largest - layer.rank if layout == "padded" else 0
        tensors[f"{PREFIX}{name}.lora_A.weight"] = F.pad(layer.lora_A, (0, 0, 0, padding))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = F.pad(layer.lora_B, (0, padding))
    for name, head in adapter.heads.items():
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in head.items()}
    return tensors


def _check_replaceable(folder: Path) -> None:
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name a folder")
    found = {p.name for p in folder.iterdir() if not storage.is_leftover(p.name)} if folder.is_dir() else set()
    ours = set(FILES) if "cobra.json" in found else {CONFIG, TENSORS}
    foreign = sorted(found - ours)
    if foreign:
        raise ValueError(f"{folder} holds other files ({', '.join(foreign[:3])}); name a new folder, nothing was written")
