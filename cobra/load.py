"""Reading LoRA folders: this library's own in both layouts, and those of peft."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cobra.lora import LoraAdapter, LoraLayer
from cobra.storage import FormatError, read_json

CONFIG, TENSORS, PROVENANCE = "adapter_config.json", "adapter_model.safetensors", "cobra.json"
PREFIX = "base_model.model."
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])\.weight")


def load_adapter(folder: Path | str) -> LoraAdapter:
    """The adapter of a folder, its scaling folded into lora_B. No pickle is ever opened.

    Raises FileNotFoundError, and FormatError for files that are truncated or contradict one another, and for adapters
    that are no plain LoRA on linear layers (DoRA, AdaLoRA, bias, embeddings, expert tensors), naming file, key and way out.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder / TENSORS)
    matrices: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = _without_prefix(folder / TENSORS, key)
        match = _MATRIX.fullmatch(name)
        if match:
            matrices.setdefault(match["module"], {})[match["which"]] = tensor
        else:
            others[name] = tensor
    if not matrices:
        raise FormatError(f"{folder / TENSORS}: no lora_A and lora_B matrices among {len(tensors)} tensors")
    provenance = read_json(folder / PROVENANCE, "adapter provenance") if (folder / PROVENANCE).is_file() else {}
    targets = config.get("target_modules")
    return LoraAdapter(
        layers={name: _layer(folder, name, pair, config) for name, pair in matrices.items()},
        heads=_heads(folder, others, config),
        transposed=bool(config.get("fan_in_fan_out")),
        dropout=float(config.get("lora_dropout") or 0.0),
        ambiguous=bool(provenance) and isinstance(targets, str),
        base_model=config.get("base_model_name_or_path"),
        provenance={k: v for k, v in provenance.items() if k not in ("kind", "version", "layout")},
    )


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the folder of a LoRA adapter")
    try:
        config = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: expected JSON, found a truncated or foreign file: {error}") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path}: expected an object of settings, found {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise FormatError(
            f"{path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'; peft.convert_to_lora makes LoRA of many others"
        )
    for field, what in (("use_dora", "DoRA"), ("lora_bias", "a bias of its own"), ("alora_invocation_tokens", "aLoRA")):
        if config.get(field):
            raise FormatError(f"{path}: {field} is set: {what} is no plain low-rank update; merge it with peft instead")
    if config.get("bias", "none") != "none":
        raise FormatError(f"{path}: bias={config['bias']!r} trains the base model's biases, which no LoRA layer holds")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        hint = f"; {pickled.name} is a pickle, which is never opened: save it again with peft" if pickled.is_file() else ""
        raise FileNotFoundError(f"{path}: no such file{hint}")
    try:
        with safe_open(path, framework="pt") as f:
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except SafetensorError as error:
        raise FormatError(f"{path}: expected safetensors, found a truncated or foreign file: {error}") from error
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise FormatError(f"{path}: {key} is {tensor.dtype}; expected floating point")
        if not torch.isfinite(tensor).all():
            raise FormatError(f"{path}: {key} holds NaN or Inf; the training that wrote it diverged")
    return tensors


def _without_prefix(path: Path, key: str) -> str:
    name = key.removeprefix(PREFIX)
    if name == key or not re.fullmatch(r"[^\s/\\]+", name) or ".." in name:
        raise FormatError(f"{path}: key {key[:80]!r} is no parameter name; expected {PREFIX}<module>.lora_A.weight")
    return name


def _layer(folder: Path, name: str, pair: dict[str, Tensor], config: dict) -> LoraLayer:
    path = folder / TENSORS
    missing = {"A", "B"} - pair.keys()
    if missing:
        raise FormatError(f"{path}: {name} has no lora_{missing.pop()}.weight")
    lora_A, lora_B = pair["A"], pair["B"]
    if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise FormatError(
            f"{path}: {name} has lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}; expected (r, in) and (out, r)"
        )
    rank = _setting(folder, config, "r", "rank_pattern", name)
    if rank != lora_A.shape[0]:
        raise FormatError(f"{folder}: {name} is of rank {lora_A.shape[0]} in {TENSORS} and {rank} in {CONFIG}")
    alpha = _setting(folder, config, "lora_alpha", "alpha_pattern", name)
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    dtype = torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), torch.float32)
    lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype) * scaling
    # a rank whose row and column are both 0 is padding: it contributes nothing and never will
    alive = (lora_A != 0).any(1) | (lora_B != 0).any(0)
    kept = int(alive.nonzero().max()) + 1 if alive.any() else 0
    return LoraLayer(lora_A[:kept].contiguous(), lora_B[:, :kept].contiguous())


def _setting(folder: Path, config: dict, field: str, pattern_field: str, name: str) -> float:
    """peft's rule: the first pattern that the name, or an ending of it after a dot, matches; else the common value."""
    patterns = config.get(pattern_field) or {}
    try:
        found = next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), config.get(field))
    except (re.error, AttributeError) as error:
        raise FormatError(f"{folder / CONFIG}: {pattern_field} is no mapping of names to numbers: {error}") from error
    if not isinstance(found, (int, float)) or isinstance(found, bool) or found <= 0:
        raise FormatError(f"{folder / CONFIG}: {field} of {name} is {found!r}; expected a number greater than 0")
    return found


def _heads(folder: Path, tensors: dict[str, Tensor], config: dict) -> dict[str, dict[str, Tensor]]:
    """Tensors of whole modules, by module; the config's names are endings of full names."""
    endings = config.get("modules_to_save") or []
    heads: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        module = next(
            (".".join(parts[:n]) for n in range(1, len(parts)) for e in endings if f".{'.'.join(parts[:n])}".endswith(f".{e}")),
            None,
        )
        if module is None:
            raise FormatError(
                f"{folder / TENSORS}: {name} is neither a LoRA matrix of a linear layer nor part of modules_to_save "
                f"({', '.join(endings) or 'none'}); merge this adapter with peft instead"
            )
        heads.setdefault(module, {})[".".join(parts[len(module.split(".")) :])] = tensor
    return heads
