"""Reading LoRA folders: this library's own in both layouts, and those of peft."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from cobra.export.folder import CONFIG, PREFIX, TENSORS, Checkpoint, read_checkpoint
from cobra.export.rules import changes_base
from cobra.lora import LoraAdapter, LoraLayer
from cobra.storage import FormatError, read_json

PROVENANCE = "cobra.json"
NOT_PLAIN = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in lora_B",
    "alora_invocation_tokens": "aLoRA",
    "use_qalora": "QALoRA",
    "layer_replication": "replicated layers",
    "use_bdlora": "BD-LoRA",
    "trainable_token_indices": "trained tokens",
}


def load_adapter(folder: Path | str) -> LoraAdapter:
    """The adapter of a folder, its scaling folded into lora_B. No pickle is ever opened.

    Raises FileNotFoundError, and FormatError for files that are truncated or contradict one another, and for adapters
    that are no plain LoRA on linear layers (DoRA, AdaLoRA, PiSSA, biases, embeddings, expert tensors), naming file, key and
    way out.
    """
    folder = Path(folder)
    checkpoint = read_checkpoint(folder)
    _check_plain(folder / CONFIG, checkpoint.config)
    tensors = _read_tensors(folder / TENSORS)
    provenance = read_json(folder / PROVENANCE, "adapter provenance") if (folder / PROVENANCE).is_file() else {}
    config = checkpoint.config
    return LoraAdapter(
        layers={name: _layer(folder, name, checkpoint, tensors) for name in checkpoint.modules},
        heads=_heads(folder / TENSORS, {name: tensors[PREFIX + name] for name in checkpoint.others}, config),
        transposed=bool(config.get("fan_in_fan_out")),
        dropout=_dropout(folder / CONFIG, config.get("lora_dropout")),
        ambiguous=bool(provenance) and isinstance(config.get("target_modules"), str),
        base_model=config.get("base_model_name_or_path"),
        task_type=config.get("task_type"),
        auto_mapping=config.get("auto_mapping"),
        provenance={k: v for k, v in provenance.items() if k not in ("kind", "version", "layout")},
    )


def _dropout(path: Path, value: object) -> float:
    if value is None or (isinstance(value, (int, float)) and 0 <= value < 1):
        return float(value or 0.0)
    raise FormatError(f"{path}: lora_dropout is {value!r}, expected a number from 0 to below 1")


def _check_plain(path: Path, config: dict) -> None:
    if config["peft_type"] != "LORA":
        raise FormatError(
            f"{path}: peft_type is {config['peft_type']!r}, expected 'LORA'; peft.convert_to_lora makes LoRA of many others"
        )
    for field, what in NOT_PLAIN.items():
        if config.get(field):
            raise FormatError(f"{path}: {field} is set: {what} is no plain low-rank update; merge it with peft instead")
    if config.get("bias", "none") != "none":
        raise FormatError(f"{path}: bias={config['bias']!r} trains the base model's biases, which no LoRA layer holds")
    if changes_base(init := config.get("init_lora_weights")):
        raise FormatError(
            f"{path}: init_lora_weights={init!r} belongs to a base model whose weights were changed at the start of training; "
            "save it with peft's path_initial_model_for_weight_conversion (LoftQ has none), or load the changed base and set "
            "it to true"
        )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (safe_open is no mapping)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise FormatError(f"{path}: {key} holds NaN or Inf; the training that wrote it diverged")
    return tensors


def _layer(folder: Path, name: str, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> LoraLayer:
    path, keys = folder / TENSORS, [f"{PREFIX}{name}.lora_{which}.weight" for which in "AB"]
    if keys[0] not in tensors or tensors[keys[0]].ndim != 2 or checkpoint.is_fused_experts(name):
        raise FormatError(
            f"{path}: {name} is an embedding, a convolution or fused experts; merge this adapter with peft instead"
        )
    scale = checkpoint.scale(name)
    if scale is None:
        raise FormatError(f"{folder / CONFIG}: the rank of {name} is {checkpoint.rank(name)}; expected 1 or more")
    lora_A, lora_B = (tensors[key] for key in keys)
    dtype = torch.float64 if torch.float64 in (lora_A.dtype, lora_B.dtype) else torch.float32
    lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype) * scale
    # a rank whose row and column are both 0 is padding: it contributes nothing and never will
    alive = ((lora_A != 0).any(1) | (lora_B != 0).any(0)).nonzero()
    kept = int(alive.max()) + 1 if len(alive) else 0
    return LoraLayer(lora_A[:kept].contiguous(), lora_B[:, :kept].contiguous())


def _heads(path: Path, tensors: dict[str, Tensor], config: dict) -> dict[str, dict[str, Tensor]]:
    """Tensors of modules trained whole, by module; the config's names are endings of full names, as in peft even within a
    word."""
    endings = tuple(config.get("modules_to_save") or ())
    heads: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        outer = [".".join(parts[:n]) for n in range(1, len(parts))]
        module = next((m for m in outer if m.endswith(endings)), None)
        if module is None:
            raise FormatError(
                f"{path}: {name} is neither a LoRA matrix of a linear layer nor part of modules_to_save "
                f"({', '.join(endings) or 'none'}); merge this adapter with peft instead"
            )
        heads.setdefault(module, {})[name.removeprefix(f"{module}.")] = tensor
    return heads
