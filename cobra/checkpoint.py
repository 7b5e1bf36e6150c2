"""Training checkpoints: one safetensors file from which a run goes on with the very same bits.

It holds the matrices, gates, heads, priors, the optimizer's state, torch's random states (of the CPU and of the model's CUDA
devices, for dropout) and, in its header, the step, the config, the applied plan, and the optimizer's and scheduler's settings.
Gates need nothing more: they are a function of the step. The order of the data is the caller's to restore. Optimizer state of
other forms (8-bit moments) lies in it as the plain tensors that it is made of.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from cobra import storage
from cobra.distributed import sharded, spread, whole
from cobra.plan import RankPlan
from cobra.shrink import optimizer_name

if TYPE_CHECKING:
    from cobra.adapter import Adapter

KIND = "training checkpoint"
PAIRS, NUMBER, DTYPE, SHAPE = "pairs", "number", "dtype", "shape"  # the keys under which JSON has what it does not know
REMEDY = "save without the optimizer, or take another one"


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


def save(adapter: Adapter, path: Path | str, optimizer: Optimizer | None, scheduler) -> None:
    """Writes the checkpoint, whole or not at all. Of several ranks each writes its own file: dropout's states differ.

    Raises ValueError for an adapter that is not finite; a file that is there stays.
    """
    tensors = {f"adapter.{name}": whole(tensor) for name, tensor in adapter_tensors(adapter).items()}
    storage.check_finite(path, tensors)
    tensors["prior"] = torch.tensor([p for group in adapter.groups for p in group.prior], dtype=torch.float64)
    tensors["rng"] = torch.get_rng_state()
    tensors |= {f"rng.cuda:{index}": torch.cuda.get_rng_state(index) for index in _cuda_devices(adapter)}
    meta = {
        "step": adapter.current_step,
        "config": adapter.config.to_dict(),
        "fingerprint": adapter.base_fingerprint,
        "groups": [group.name for group in adapter.groups],
        "plan": None if adapter.plan is None else adapter.plan.to_dict(),
        "scheduler": None if scheduler is None else _encoded(scheduler.state_dict(), "scheduler"),
    }
    if optimizer is not None:
        state, meta["optimizer"] = _optimizer_parts(optimizer)
        tensors |= state
    storage.write_tensors(path, {name: whole(tensor) for name, tensor in tensors.items()}, KIND, meta)


def check_optimizer(optimizer: Optimizer) -> None:
    """Raises ValueError naming what of the optimizer no checkpoint can keep; its state is there from its first step on."""
    _optimizer_parts(optimizer)


def load(adapter: Adapter, path: Path | str, optimizer: Optimizer | None, scheduler) -> None:
    """Restores the checkpoint into an adapter freshly attached to the same base model with the same config.

    Raises FileNotFoundError; FormatError for truncated or foreign files; ValueError for another model, another config (naming
    the field), or an optimizer or scheduler that was not saved.
    """
    tensors, meta = storage.read_tensors(path, KIND)
    storage.expect(
        path,
        meta,
        {"step": lambda v: isinstance(v, int), **dict.fromkeys(("config", "fingerprint", "groups", "plan"), lambda v: True)},
    )
    _check_same_run(adapter, path, meta)
    for what, given in (("optimizer", optimizer), ("scheduler", scheduler)):
        if given is not None and not meta.get(what):
            raise ValueError(f"{path} was saved without the {what}; load it without, or save it with it")
    plan = None if meta["plan"] is None else RankPlan.from_dict(meta["plan"])
    if adapter.plan is None and plan is not None:
        adapter.apply(plan, optimizer)
    if adapter.plan != plan:
        raise ValueError(f"{path} is of another plan than was applied to this adapter; load it into a fresh one")
    names = [group.name for group in adapter.groups]
    gates = [len(group.prior) for group in adapter.groups]
    if meta["groups"] != names or len(tensors.get("prior", ())) != sum(gates) or "rng" not in tensors:
        raise storage.FormatError(
            f"{path}: {len(meta['groups'])} groups of gates, this adapter has {len(names)}, or other ones"
        )
    expected = adapter_tensors(adapter)
    for name, tensor in expected.items():
        found = tensors.get(f"adapter.{name}")
        if found is None or found.shape != tensor.shape:
            shape = None if found is None else tuple(found.shape)
            raise storage.FormatError(f"{path}: tensor {name!r} should have shape {tuple(tensor.shape)}, found {shape}")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(spread(tensors[f"adapter.{name}"], tensor))
    for group, prior in zip(adapter.groups, tensors["prior"].split(gates), strict=True):
        group.prior = tuple(prior.tolist())
    adapter.move_to_step(meta["step"])
    if optimizer is not None:
        state = _optimizer_state(path, tensors, meta["optimizer"])
        if len(state["param_groups"]) < len(optimizer.param_groups):  # saved from an optimizer made after the cut
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        optimizer.load_state_dict(_spread_state(state, optimizer))
    if scheduler is not None:
        scheduler.load_state_dict(_decoded(meta["scheduler"]))
    torch.set_rng_state(tensors["rng"])
    for index in _cuda_devices(adapter):
        if f"rng.cuda:{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda:{index}"], index)


def _check_same_run(adapter: Adapter, path: Path | str, meta: dict) -> None:
    if meta["fingerprint"] != adapter.base_fingerprint:
        raise ValueError(
            f"{path} is of another model: fingerprint {meta['fingerprint']}, this adapter's is {adapter.base_fingerprint}"
        )
    ours = json.loads(json.dumps(adapter.config.to_dict()))
    # another backend computes the same, but for the last bits; how lora_A was drawn is past, its values are in the file
    del ours["backend"], ours["share_inputs"], ours["init"]
    saved = {"basis": "gates", **meta["config"]}  # what older files do not say
    if (ours["gate"], saved["basis"]) == ("open", "gates"):  # of which nothing is trained: ours decides at the cut
        del ours["basis"]
    changed = [k for k in ours if saved.get(k) != ours[k]]
    if changed:
        k = changed[0]
        raise ValueError(f"{path} was trained with {k}={saved.get(k)!r}, this adapter has {k}={ours[k]!r}")


def _optimizer_parts(optimizer: Optimizer) -> tuple[dict[str, Tensor], object]:
    """Its state for the file's tensors and for its header."""
    name, state = optimizer_name(optimizer), optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict] = {}
    forms: dict[str, dict] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            what = f"state {key!r} of {name}"
            if isinstance(value, Tensor) and (sharded(value) or not is_traceable_wrapper_subclass(value)):
                tensors[f"optimizer.{index}.{key}"] = value
            elif any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                forms.setdefault(str(index), {})[key] = _form(value, tensors, what)
            else:
                scalars.setdefault(str(index), {})[key] = _encoded(value, what, REMEDY)
    groups = _encoded(state["param_groups"], f"optimizer {name}")
    return tensors, {"param_groups": groups, "scalars": scalars, "forms": forms}


def _form(value: object, tensors: dict[str, Tensor], what: str) -> dict:
    """How a value is made of tensors, for JSON; the tensors join the others."""
    if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value) and not sharded(value):
        parts, context = value.__tensor_flatten__()
        return {
            "class": [type(value).__module__, type(value).__qualname__],
            "parts": {part: _form(getattr(value, part), tensors, what) for part in parts},
            "context": _encoded(context, what, REMEDY),
            "layout": [list(value.shape), list(value.stride())],
        }
    if isinstance(value, Tensor):
        name = f"form.{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": {key: _form(item, tensors, what) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"list": [_form(item, tensors, what) for item in value]}
    return {"value": _encoded(value, what, REMEDY)}


def _formed(form: dict, tensors: dict[str, Tensor], path: Path | str) -> object:
    if "class" in form:
        parts = {part: _formed(each, tensors, path) for part, each in form["parts"].items()}
        context, layout = _decoded(form["context"]), [torch.Size(form["layout"][0]), tuple(form["layout"][1])]
        return _tensor_class(*form["class"], path).__tensor_unflatten__(parts, context, *layout)
    if "tensor" in form:
        return tensors[form["tensor"]]
    if "dict" in form:
        return {key: _formed(item, tensors, path) for key, item in form["dict"].items()}
    if "list" in form:
        return [_formed(item, tensors, path) for item in form["list"]]
    return _decoded(form["value"])


def _tensor_class(module: str, name: str, path: Path | str) -> type[Tensor]:
    """Only of what is imported already: a file decides on no code that is run."""
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, Tensor) and hasattr(found, "__tensor_unflatten__")):
        raise ValueError(
            f"{path} holds optimizer state as {module}.{name}: make the optimizer of that run, and load it into it"
        )
    return found


def _optimizer_state(path: Path | str, tensors: dict[str, Tensor], meta: dict) -> dict:
    state: dict[int, dict] = {int(index): dict(values) for index, values in _decoded(meta["scalars"]).items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    for index, forms in meta.get("forms", {}).items():
        state.setdefault(int(index), {}).update({key: _formed(form, tensors, path) for key, form in forms.items()})
    return {"state": state, "param_groups": _decoded(meta["param_groups"])}


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


def _encoded(value: object, what: str, remedy: str = "use plain numbers (lr=1e-3)") -> object:
    """The value for JSON; dictionaries with other keys than strings become lists of pairs, tensors of one number say so."""
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        return {PAIRS: [[key, _encoded(item, what, remedy)] for key, item in value.items()]}
    if isinstance(value, dict):
        return {key: _encoded(item, f"{what} field {key!r}", remedy) for key, item in value.items()}
    if isinstance(value, torch.Size):
        return {SHAPE: list(value)}
    if isinstance(value, (list, tuple)):
        return [_encoded(item, what, remedy) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor) and value.ndim == 0:
        return {NUMBER: [value.item(), str(value.dtype)]}
    if isinstance(value, torch.dtype):
        return {DTYPE: str(value)}
    raise ValueError(f"the {what} holds a {type(value).__name__}, which no checkpoint can keep; {remedy}")


def _decoded(value: object) -> object:
    if isinstance(value, dict) and value.keys() == {PAIRS}:
        return {key: _decoded(item) for key, item in value[PAIRS]}
    if isinstance(value, dict) and value.keys() == {NUMBER}:
        number, dtype = value[NUMBER]
        return torch.tensor(number, dtype=_dtype(dtype), device="cpu")
    if isinstance(value, dict) and value.keys() == {DTYPE}:
        return _dtype(value[DTYPE])
    if isinstance(value, dict) and value.keys() == {SHAPE}:
        return torch.Size(value[SHAPE])
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name.removeprefix("torch."))
