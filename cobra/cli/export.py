"""Adapters written anew: in the other layout, or from a training checkpoint and its base model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

import cobra
from cobra import checkpoint, storage
from cobra.budget import Budget
from cobra.cli.base import find_class, head_tensors, in_saved_dtype, load_base, recorded_class, with_class
from cobra.cli.outputs import check_new_folder
from cobra.export.card import model_card
from cobra.export.check import ENGINES, AdapterCheck, check_adapter
from cobra.export.folder import CONFIG
from cobra.export.load import PROVENANCE
from cobra.lora import LoraAdapter, LoraLayer, class_name
from cobra.sites import linear_weight

CHECKPOINT, CARD = "cobra.safetensors", "README.md"


def export_adapter(
    source: Path,
    out: Path,
    layout: str = "compact",
    engines: Sequence[str] = (),
    base: Path | None = None,
    architecture: str | None = None,
) -> AdapterCheck:
    """Writes the adapter of `source` to a new folder, whole or not at all, and checks the result.

    source: an adapter folder, of COBRA or peft; or a training checkpoint, cobra.safetensors or a folder with one, which is cut
        to its budget where its search was still going on
    engines: that must load it; none of them given, all are asked and none must
    base: the model's folder, minilm or smollm2. A checkpoint needs it; to an adapter of COBRA it gives back the layers of rank
        0, as zeros
    architecture: a class for the base, of transformers or MeanPoolClassifier; by default the one that the source says it was
        trained as, else the one in the base's config.json

    Raises FileNotFoundError, ValueError for an output that exists, an engine that would not load it and a base that does not
    fit, OSError where the output cannot be written, and what loading raises.
    """
    check_new_folder(out)
    path = _checkpoint_in(source)
    if path is not None and base is None:
        raise ValueError(f"{path} is a training checkpoint, and needs the model it was trained on: --base MODEL")
    if path is not None:
        adapter, card = _from_checkpoint(path, base, architecture), None
    else:
        adapter = _in_planned_order(cobra.load_adapter(source), {})
        card = _card_of(source, adapter)
        if base is not None:
            adapter = _with_zeros(adapter, load_base(base, architecture or recorded_class(adapter), head_tensors(adapter)))
    with storage.new_folder(out) as fresh:
        adapter.save_pretrained(fresh, layout)
        if card is not None:
            storage.write_bytes(fresh / CARD, card)
        elif layout == "compact":
            storage.write_bytes(fresh / CARD, model_card(_completed(adapter), layout).encode())
        found = dataclasses.replace(check_adapter(fresh, engines or ENGINES), folder=str(out))
        if engines:
            _require(found)
    return found


def _require(found: AdapterCheck) -> None:
    for verdict in found.verdicts.values():
        if not verdict.ok:
            first = verdict.findings[0]
            fix = f"; {first.fix}" if first.fix else ""
            raise ValueError(f"{verdict.engine} {verdict.version} would not load it: {first.message}{fix}; nothing was written")


def _checkpoint_in(source: Path) -> Path | None:
    if source.is_file():
        return source
    return source / CHECKPOINT if (source / CHECKPOINT).is_file() and not (source / CONFIG).is_file() else None


# training checkpoints


def _from_checkpoint(path: Path, base: Path, architecture: str | None) -> LoraAdapter:
    tensors, meta = storage.read_tensors(path, checkpoint.KIND)
    storage.expect(path, meta, {"config": lambda v: isinstance(v, dict), "plan": lambda v: v is None or isinstance(v, dict)})
    trained = {name.removeprefix("adapter."): tensor for name, tensor in tensors.items() if name.startswith("adapter.")}
    heads = {name: tensor for name, tensor in trained.items() if not name.endswith((".lora_A", ".lora_B", ".lora_gate"))}
    config, sites, beside = _config(path, meta["config"]), _sites(trained, meta["plan"]), _config_beside(path)
    recorded = _class_of(beside)
    model = in_saved_dtype(load_base(base, architecture or recorded, heads), heads)
    budget = Budget.of(config.rank_budget)  # a small number was warned of when the run began
    unscored = {"init": "uniform", "prior_level": "group"}  # starts and priors come with the checkpoint
    adapter = cobra.attach(model, dataclasses.replace(config, target_modules=sites, rank_budget=budget, **unscored))
    adapter.config = config
    adapter.load_checkpoint(path)
    if adapter.plan is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a cut that is early: the next one says it
            adapter.apply(adapter.extract())
        warnings.warn(
            f"{path}: the search was still going on, at step {meta['step']}: cut to its budget as it was", stacklevel=3
        )
    return adapter.to_lora() if recorded is None else with_class(adapter.to_lora(), recorded, beside)


def _config_beside(path: Path) -> PreTrainedConfig | None:
    """The config.json that training wrote beside a checkpoint."""
    if path.name != CHECKPOINT or not path.with_name("config.json").is_file():
        return None
    return PreTrainedConfig.from_pretrained(path.parent, local_files_only=True)


def _class_of(config: PreTrainedConfig | None) -> str | None:
    """In the words of `class_name`."""
    name = next(iter(getattr(config, "architectures", None) or []), None)
    found = name and find_class(name)
    return class_name(found) if found else name


def _config(path: Path, values: dict) -> cobra.CobraConfig:
    budget = values.get("rank_budget")
    try:
        given = {"basis": "gates", **values}  # what older files do not say
        return cobra.CobraConfig(**given | {"rank_budget": Budget.from_dict(budget) if isinstance(budget, dict) else budget})
    except TypeError as error:
        raise storage.FormatError(f"{path}: the config is of another release: {error}") from error


def _sites(names: Iterable[str], plan: dict | None) -> tuple[str, ...]:
    """The layers that were attached: those of the plan, or where none was applied those with matrices."""
    if plan is not None:
        return tuple(cobra.RankPlan.from_dict(plan).ranks)
    return tuple(name.removesuffix(".lora_A") for name in names if name.endswith(".lora_A"))


# what a compact folder does not hold


def _with_zeros(adapter: LoraAdapter, model: nn.Module) -> LoraAdapter:
    """The adapter with the layers of rank 0 that its plan names, shaped as the base model has them."""
    return _in_planned_order(adapter, {name: _empty_layer(model, name) for name in _dropped(adapter)})


def _empty_layer(model: nn.Module, name: str) -> LoraLayer:
    try:
        N, K = linear_weight(model.get_submodule(name)).shape
    except AttributeError:
        raise ValueError(f"the base has no layer {name!r}, which the adapter's plan names: it is another model") from None
    return LoraLayer(torch.empty(0, K), torch.empty(N, 0))


def _completed(adapter: LoraAdapter) -> LoraAdapter:
    """With layers of rank 0 of no size, for the card's tables."""
    return _in_planned_order(adapter, {n: LoraLayer(torch.empty(0, 0), torch.empty(0, 0)) for n in _dropped(adapter)})


def _dropped(adapter: LoraAdapter) -> list[str]:
    return [name for name, rank in _planned(adapter).items() if name not in adapter.layers and not rank]


def _planned(adapter: LoraAdapter) -> dict[str, int]:
    plan = adapter.provenance.get("plan")
    return cobra.RankPlan.from_dict(plan).ranks if isinstance(plan, dict) else {}


def _in_planned_order(adapter: LoraAdapter, added: dict[str, LoraLayer]) -> LoraAdapter:
    layers = adapter.layers | added
    order = [name for name in _planned(adapter) if name in layers]
    return dataclasses.replace(adapter, layers={name: layers[name] for name in [*order, *layers]})


def _card_of(folder: Path, adapter: LoraAdapter) -> bytes | None:
    """The folder's model card, unless it is the one that was written with it and nobody has changed since."""
    if not (folder / CARD).is_file():
        return None
    card = (folder / CARD).read_bytes()
    if not (folder / PROVENANCE).is_file():
        return card
    layout = storage.read_json(folder / PROVENANCE, "adapter provenance").get("layout")
    written = layout and model_card(_completed(adapter) if layout == "compact" else adapter, layout).encode()
    return None if card == written else card
