"""Training checkpoints: one safetensors file from which a run goes on with the very same bits.

It holds the matrices, gates, heads, whatever else is trained, priors, running statistics of the base model, the optimizer's
state, torch's random states (of the CPU and of the model's CUDA devices, for dropout) and, in its header, the step, the config,
the applied plan, and the optimizer's and scheduler's settings. Gates need nothing more: they are a function of the step. The
order of the data is the caller's to restore. Optimizer state of other forms (8-bit moments) lies in it as the plain tensors
that it is made of.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cobra import storage
from cobra.distributed import spread, whole
from cobra.optimizer_state import decoded, encoded, from_parts, to_parts
from cobra.plan import RankPlan
from cobra.statistics import running_statistics

if TYPE_CHECKING:
    from cobra.adapter import Adapter

KIND = "training checkpoint"
Optimizers = Optimizer | Sequence[Optimizer] | None
Schedulers = LRScheduler | Sequence[LRScheduler] | None


def adapter_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Everything that training changes, by name; the tensors themselves, not copies."""
    tensors: dict[str, Tensor] = {}
    for group in adapter.groups:
        for site, layers in zip(group.sites, group.layers, strict=True):
            tensors[f"{site.name}.lora_A"], tensors[f"{site.name}.lora_B"] = layers[0].lora_A, layers[0].lora_B
        if group.gate is not None:
            tensors[f"{group.name}.lora_gate"] = group.gate
    for name, head in adapter.heads.items():
        tensors |= {f"{name}.{key}": value for key, value in head.state_dict(keep_vars=True).items()}
    return tensors


def other_parameters(adapter: Adapter) -> dict[str, nn.Parameter]:
    """What is trained beside the adapter, by name: nothing that its folder has a place for."""
    ours = {id(tensor) for tensor in adapter_tensors(adapter).values()}
    return {name: p for name, p in adapter.model.named_parameters() if p.requires_grad and id(p) not in ours}


def save(adapter: Adapter, path: Path | str, optimizer: Optimizers, scheduler: Schedulers) -> None:
    """Writes the checkpoint, whole or not at all. Of several ranks each writes its own file: dropout's states differ.

    Raises ValueError for an adapter that is not finite; a file that is there stays.
    """
    tensors = {f"adapter.{name}": whole(tensor) for name, tensor in adapter_tensors(adapter).items()}
    tensors |= {f"other.{name}": whole(p) for name, p in other_parameters(adapter).items()}
    storage.check_finite(path, tensors)
    tensors["prior"] = torch.tensor([p for group in adapter.groups for p in group.prior], dtype=torch.float64)
    tensors["rng"] = torch.get_rng_state()
    tensors |= {f"rng.cuda:{index}": torch.cuda.get_rng_state(index) for index in _cuda_devices(adapter)}
    tensors |= {f"statistics.{name}": tensor for name, tensor in running_statistics(adapter.model, adapter.heads).items()}
    meta = {
        "step": adapter.current_step,
        "config": adapter.config.to_dict(),
        "fingerprint": adapter.base_fingerprint,
        "groups": [group.name for group in adapter.groups],
        "plan": None if adapter.plan is None else adapter.plan.to_dict(),
        "scheduler": [encoded(each.state_dict(), "scheduler") for each in _several(scheduler)],
        "optimizer": [],
    }
    for place, each in enumerate(_several(optimizer)):
        state, settings = to_parts(each, place)
        tensors |= state
        meta["optimizer"].append(settings)
    storage.write_tensors(path, {name: whole(tensor) for name, tensor in tensors.items()}, KIND, meta)


def load(adapter: Adapter, path: Path | str, optimizer: Optimizers, scheduler: Schedulers) -> None:
    """Restores the checkpoint into an adapter freshly attached to the same base model with the same config.

    Raises FileNotFoundError; FormatError for truncated or foreign files; ValueError for another model, another config (naming
    the field), or optimizers or schedulers that were not saved, or in another number.
    """
    tensors, meta = storage.read_tensors(path, KIND)
    storage.expect(
        path,
        meta,
        {"step": lambda v: isinstance(v, int), **dict.fromkeys(("config", "fingerprint", "groups", "plan"), lambda v: True)},
    )
    _check_same_run(adapter, path, meta)
    optimizers, schedulers = _several(optimizer), _several(scheduler)
    saved = {what: _saved(path, meta, what, given) for what, given in (("optimizer", optimizers), ("scheduler", schedulers))}
    plan = None if meta["plan"] is None else RankPlan.from_dict(meta["plan"])
    if adapter.plan is None and plan is not None:
        adapter.current_step = meta["step"]  # what was trained before the cut was so with these steps
        adapter.apply(plan, optimizers)
    if adapter.plan != plan:
        raise ValueError(f"{path} is of another plan than was applied to this adapter; load it into a fresh one")
    names = [group.name for group in adapter.groups]
    gates = [len(group.prior) for group in adapter.groups]
    if meta["groups"] != names or len(tensors.get("prior", ())) != sum(gates) or "rng" not in tensors:
        raise storage.FormatError(
            f"{path}: {len(meta['groups'])} groups of gates, this adapter has {len(names)}, or other ones"
        )
    expected, others = adapter_tensors(adapter), _others(adapter, path, tensors)
    for name, tensor in expected.items():
        found = tensors.get(f"adapter.{name}")
        if found is None or found.shape != tensor.shape:
            shape = None if found is None else tuple(found.shape)
            raise storage.FormatError(f"{path}: tensor {name!r} should have shape {tuple(tensor.shape)}, found {shape}")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(spread(tensors[f"adapter.{name}"], tensor))
        for name, tensor in running_statistics(adapter.model, adapter.heads).items():
            tensor.copy_(tensors.get(f"statistics.{name}", tensor))  # older files have none
        for name, tensor in others.items():
            tensor.copy_(spread(tensors[f"other.{name}"], tensor))
    for group, prior in zip(adapter.groups, tensors["prior"].split(gates), strict=True):
        group.prior = tuple(prior.tolist())
    adapter.move_to_step(meta["step"])
    for place, (each, settings) in enumerate(zip(optimizers, saved["optimizer"], strict=True)):
        state = from_parts(path, tensors, settings, place)
        if len(state["param_groups"]) < len(each.param_groups):  # saved from an optimizer made after the cut
            each.param_groups[:] = [group for group in each.param_groups if group["params"]]
        each.load_state_dict(_spread_state(state, each))
    for each, settings in zip(schedulers, saved["scheduler"], strict=True):
        each.load_state_dict(decoded(settings))
    torch.set_rng_state(tensors["rng"])
    for index in _cuda_devices(adapter):
        if f"rng.cuda:{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda:{index}"], index)


def _others(adapter: Adapter, path: Path | str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the file has of other parameters, as the model holds them; older files have none.

    Raises ValueError for one that the model lacks or has in another shape.
    """
    found, held = {}, dict(adapter.model.named_parameters(remove_duplicate=False))
    for key in (key for key in tensors if key.startswith("other.")):
        name = key.removeprefix("other.")
        if name not in held or held[name].shape != tensors[key].shape:
            here = tuple(held[name].shape) if name in held else "nothing"
            raise ValueError(
                f"{path}: {name} {tuple(tensors[key].shape)} was trained beside the adapter, and this model has {here} of that "
                "name; make it as for the run that was saved"
            )
        found[name] = held[name]
    return found


def _several(given: object) -> list:
    """None, one, or several of them in order."""
    if given is None:
        return []
    return list(given) if isinstance(given, Sequence) else [given]


def _saved(path: Path | str, meta: dict, what: str, given: Sequence) -> list[dict]:
    """What the file has of the optimizers or schedulers that are passed; files from before there were several hold one."""
    saved = meta.get(what) or []
    saved = [saved] if isinstance(saved, dict) else saved
    if given and not saved:
        raise ValueError(f"{path} was saved without the {what}; load it without, or save it with it")
    if given and len(given) != len(saved):
        raise ValueError(
            f"{path} was saved with {len(saved)} {what}s, {len(given)} are passed; pass all of them, in that order"
        )
    return saved if given else []


def _check_same_run(adapter: Adapter, path: Path | str, meta: dict) -> None:
    if meta["fingerprint"] != adapter.base_fingerprint:
        raise ValueError(
            f"{path} is of another model: fingerprint {meta['fingerprint']}, this adapter's is {adapter.base_fingerprint}"
        )
    ours = json.loads(json.dumps(adapter.config.to_dict()))
    # another backend computes the same, but for the last bits; how lora_A was drawn is past, its values are in the file
    for past in ("backend", "share_inputs", "init", "init_scale"):
        del ours[past]
    saved = {"basis": "gates", **meta["config"]}  # what older files do not say
    if (ours["gate"], saved["basis"]) == ("open", "gates"):  # of which nothing is trained: ours decides at the cut
        del ours["basis"]
    changed = [k for k in ours if saved.get(k) != ours[k]]
    if changed:
        k = changed[0]
        raise ValueError(f"{path} was trained with {k}={saved.get(k)!r}, this adapter has {k}={ours[k]!r}")


def _spread_state(state: dict, optimizer: Optimizer) -> dict:
    """The state with every tensor that is shaped like its parameter held as that parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        p = parameters[index]
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                values[key] = spread(value, p)
    return state


def _cuda_devices(adapter: Adapter) -> list[int]:
    return sorted({p.device.index for p in adapter.model.parameters() if p.device.type == "cuda"})
