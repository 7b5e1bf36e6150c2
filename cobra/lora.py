"""LoRA matrices at rest: what an adapter folder holds, whoever wrote it."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from cobra.sites import is_conv1d, is_linear, is_quantised_linear

if TYPE_CHECKING:
    from cobra.adapter import Adapter

ARCHITECTURE = "architecture"  # in provenance: the class that the adapter was trained as
LABELS = "labels"  # and the names of its outputs, in their order

T = TypeVar("T")


def class_name(kind: type) -> str:
    """As config.json names transformers' own classes; another one with its module, to import it from."""
    own = getattr(sys.modules.get("transformers"), kind.__name__, None) is kind
    return kind.__name__ if own else f"{kind.__module__}.{kind.__qualname__}"


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """ΔW = lora_B @ lora_A, with scaling and gates in lora_B.

    lora_A: (r, K), lora_B: (N, r); r = 0 for a layer that got no rank
    """

    lora_A: Tensor
    lora_B: Tensor

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def in_features(self) -> int:
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[0]


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """An adapter apart from any model.

    layers: full name of the linear module in the base model -> its matrices
    heads: full name of a module that was trained whole -> its state
    transposed: whether the linear modules are transformers' Conv1D
    dropout: on the branch's input in training
    ambiguous: whether a layer's full name is the end of another module's, which peft would then adapt too
    base_model: name or path of the base model, where known
    task_type: peft's, e.g. "CAUSAL_LM", where its writer said it
    auto_mapping: peft's: class and module of the base model, for its AutoPeftModel classes
    provenance: what the writer recorded (plan, config, calibration); {} for adapters of other programs
    """

    layers: dict[str, LoraLayer]
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    transposed: bool = False
    dropout: float = 0.0
    ambiguous: bool = False
    base_model: str | None = None
    task_type: str | None = None
    auto_mapping: dict[str, str] | None = None
    provenance: dict = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        return {name: layer.rank for name, layer in self.layers.items()}

    @property
    def parameters(self) -> int:
        """Elements of all lora_A and lora_B."""
        return sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in self.layers.values())

    def attach(self, model: nn.Module) -> Adapter:
        """Puts the matrices on their base model and returns the handle: train on, merge, unmerge, save (`cobra.attach`). Its
        `to_lora` has this adapter's task type, and its record of the class.

        The model's linear layers and heads must be those of this adapter; raises ValueError naming what differs.
        """
        from cobra.attach import attach_lora

        adapter = attach_lora(model, self)
        adapter.origin = replace(self, layers={}, heads={})
        return adapter

    def save_pretrained(self, folder: Path | str, layout: str = "compact") -> None:
        """Writes a plain LoRA checkpoint that peft loads (`cobra.export.peft`)."""
        from cobra.export.peft import save_pretrained

        save_pretrained(self, folder, layout)

    def __repr__(self) -> str:
        ranks = self.ranks.values()
        heads = f", {len(self.heads)} heads" if self.heads else ""
        return (
            f"LoraAdapter({len(ranks)} layers of rank {min(ranks, default=0)} to {max(ranks, default=0)}, "
            f"{self.parameters:,} parameters{heads})"
        )


def check_layer(model: nn.Module, name: str, layer: LoraLayer) -> None:
    """Raises ValueError where a model has no such linear layer, or one of other features."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the adapter is of another model: this one has no layer {name!r}") from None
    plain = (isinstance(module, nn.Linear) or is_conv1d(module)) and module.weight.is_floating_point()
    if not plain and not is_quantised_linear(module):
        raise ValueError(
            f"{name} is a {type(module).__name__}, and the adapter is for nn.Linear or Conv1D in floating point: where the "
            "base is quantised, choose its dequantised form (load it unquantised, or model.dequantize())"
        )
    found = tuple(module.weight.shape) if is_conv1d(module) else (module.in_features, module.out_features)
    if found != (layer.in_features, layer.out_features):
        raise ValueError(
            f"the adapter is of another model: {name} is {layer.in_features} -> {layer.out_features} in the adapter, "
            f"{found[0]} -> {found[1]} here"
        )


def check_forward(model: nn.Module, name: str) -> None:
    """Raises ValueError for a linear layer that an adapter cannot take the place of."""
    module = model.get_submodule(name)
    if not (is_linear(module) or is_quantised_linear(module)):
        raise ValueError(
            f"{name} is a {type(module).__name__}, which has a forward of its own or is read and never called: an adapter "
            "cannot take the place of nn.Linear's there; use this adapter in peft, unmerged, or leave the layer out of it"
        )


def check_names(model: nn.Module, held: Container[str]) -> None:
    """Raises ValueError for a module under several names of which the adapter holds some: peft adapts it under one."""
    named: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        named.setdefault(id(module), []).append(name)
    for names in named.values():
        lacking = [name for name in names if name not in held]
        if 0 < len(lacking) < len(names):
            one = next(name for name in names if name in held)
            raise ValueError(
                f"{one} and {lacking[0]} are one module here, and the adapter holds an update for {one} alone: a module is "
                "adapted under all of its names or none; use this adapter in peft, unmerged, or leave the layer out of it"
            )


def combine(adapters: Iterable[tuple[LoraAdapter, float]]) -> LoraAdapter:
    """Several adapters as one, ΔW = Σ weight · ΔW_i: ranks are put side by side, so that a merge of them all rounds once.

    adapters: (adapter, weight) pairs; a layer that some of them lack counts as 0 there. Dropout, task type, class and names of
        outputs are kept where all agree

    Raises ValueError for an empty list, layers of different shapes, and more than one adapter with heads.
    """
    adapters = list(adapters)
    if not adapters:
        raise ValueError("no adapters to combine")
    heads = [adapter.heads for adapter, _ in adapters if adapter.heads]
    if len(heads) > 1:
        raise ValueError(f"{len(heads)} of the adapters bring heads ({', '.join(heads[0])}), which cannot be added; keep one")
    agreed = {key: _agreed(adapter.provenance.get(key) for adapter, _ in adapters) for key in (ARCHITECTURE, LABELS)}
    parts: dict[str, list[tuple[LoraLayer, float]]] = {}
    for adapter, weight in adapters:
        for name, layer in adapter.layers.items():
            parts.setdefault(name, []).append((layer, weight))
    return LoraAdapter(
        layers={name: _side_by_side(name, layers) for name, layers in parts.items()},
        heads=heads[0] if heads else {},
        transposed=any(adapter.transposed for adapter, _ in adapters),
        dropout=_agreed(adapter.dropout for adapter, _ in adapters) or 0.0,
        ambiguous=any(adapter.ambiguous for adapter, _ in adapters),
        base_model=adapters[0][0].base_model,
        task_type=_agreed(adapter.task_type for adapter, _ in adapters),
        auto_mapping=_agreed(adapter.auto_mapping for adapter, _ in adapters),
        provenance={key: value for key, value in agreed.items() if value is not None},
    )


def _agreed(values: Iterable[T | None]) -> T | None:
    """The value that all have, or None."""
    first, *others = values
    return first if all(value == first for value in others) else None


def _side_by_side(name: str, layers: list[tuple[LoraLayer, float]]) -> LoraLayer:
    shapes = {(layer.in_features, layer.out_features) for layer, _ in layers}
    if len(shapes) > 1:
        found = " and ".join(f"{K} -> {N}" for K, N in sorted(shapes))
        raise ValueError(f"{name}: the adapters are of different base models, its features are {found}")
    dtype = layers[0][0].lora_B.dtype
    for layer, _ in layers[1:]:
        dtype = torch.promote_types(dtype, layer.lora_B.dtype)
    dtype = torch.promote_types(dtype, torch.float32)  # weights are applied before any rounding
    return LoraLayer(
        torch.cat([layer.lora_A.to(dtype) for layer, _ in layers]),
        torch.cat([weight * layer.lora_B.to(dtype) for layer, weight in layers], 1),
    )
