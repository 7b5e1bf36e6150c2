"""An optimizer's state and settings as plain tensors and JSON, and back: without pickle, for whatever library made it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from cobra.distributed import sharded
from cobra.shrink import optimizer_name

# the keys under which JSON has what it does not know
MARKERS = PAIRS, NUMBER, DTYPE, SHAPE, COUNTER = "pairs", "number", "dtype", "shape", "counter"
REMEDY = "save without the optimizer, or take another one"


def to_parts(optimizer: Optimizer, place: int = 0) -> tuple[dict[str, Tensor], dict]:
    """Plain tensors by name, and what JSON takes: settings, numbers, and how the rest is made of tensors.

    place: among several optimizers of one file

    Raises ValueError naming what of the optimizer no checkpoint can keep; its state is there from its first step on.
    """
    name, state, prefix = optimizer_name(optimizer), optimizer.state_dict(), _prefix(place)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict] = {}
    forms: dict[str, dict] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            what = f"state {key!r} of {name}"
            if isinstance(value, Tensor) and (sharded(value) or not is_traceable_wrapper_subclass(value)):
                tensors[f"{prefix}{index}.{key}"] = value
            elif any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                forms.setdefault(str(index), {})[key] = _form(value, tensors, what, f"form.{prefix if place else ''}")
            else:
                scalars.setdefault(str(index), {})[key] = encoded(value, what, REMEDY)
    groups = encoded(state["param_groups"], f"optimizer {name}")
    return tensors, {"param_groups": groups, "scalars": scalars, "forms": forms}


def _prefix(place: int) -> str:
    return f"optimizer:{place}." if place else "optimizer."


def _form(value: object, tensors: dict[str, Tensor], what: str, prefix: str) -> dict:
    """How a value is made of tensors, for JSON; the tensors join the others."""
    if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value) and not sharded(value):
        parts, context = value.__tensor_flatten__()
        return {
            "class": [type(value).__module__, type(value).__qualname__],
            "parts": {part: _form(getattr(value, part), tensors, what, prefix) for part in parts},
            "context": encoded(context, what, REMEDY),
            "layout": [list(value.shape), list(value.stride())],
        }
    if isinstance(value, Tensor):
        name = f"{prefix}{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[encoded(key, what, REMEDY), _form(item, tensors, what, prefix)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_form(item, tensors, what, prefix) for item in value]}
    return {"value": encoded(value, what, REMEDY)}


def _formed(form: dict, tensors: dict[str, Tensor], path: Path | str) -> object:
    if "class" in form:
        parts = {part: _formed(each, tensors, path) for part, each in form["parts"].items()}
        context, layout = decoded(form["context"]), [torch.Size(form["layout"][0]), tuple(form["layout"][1])]
        return _tensor_class(*form["class"], path).__tensor_unflatten__(parts, context, *layout)
    if "tensor" in form:
        return tensors[form["tensor"]]
    if "dict" in form:
        pairs = form["dict"].items() if isinstance(form["dict"], dict) else form["dict"]  # older files have no pairs
        return {_key(key): _formed(item, tensors, path) for key, item in pairs}
    if "list" in form:
        return [_formed(item, tensors, path) for item in form["list"]]
    return decoded(form["value"])


def _tensor_class(module: str, name: str, path: Path | str) -> type[Tensor]:
    """Only of what is imported already: a file decides on no code that is run."""
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, Tensor) and hasattr(found, "__tensor_unflatten__")):
        raise ValueError(
            f"{path} holds optimizer state as {module}.{name}: make the optimizer of that run, and load it into it"
        )
    return found


def from_parts(path: Path | str, tensors: dict[str, Tensor], meta: dict, place: int = 0) -> dict:
    """A state dict of what `to_parts` gave. Raises ValueError for tensors of classes that nothing here has imported."""
    scalars = meta["scalars"].items()
    state = {int(index): {key: decoded(value) for key, value in values.items()} for index, values in scalars}
    for name, tensor in tensors.items():
        if name.startswith(_prefix(place)):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    for index, forms in meta.get("forms", {}).items():
        state.setdefault(int(index), {}).update({key: _formed(form, tensors, path) for key, form in forms.items()})
    return {"state": state, "param_groups": decoded(meta["param_groups"])}


def encoded(value: object, what: str, remedy: str = "use plain numbers (lr=1e-3)") -> object:
    """The value for JSON; dictionaries with other keys than strings, or a marker's alone, become lists of pairs, tensors of
    one number say so."""
    if isinstance(value, Counter):  # milestones of schedulers
        return {COUNTER: [[key, number] for key, number in value.items()]}
    if isinstance(value, dict) and (not all(isinstance(key, str) for key in value) or [*value] in [[m] for m in MARKERS]):
        return {PAIRS: [[encoded(key, what, remedy), encoded(item, what, remedy)] for key, item in value.items()]}
    if isinstance(value, dict):
        return {key: encoded(item, f"{what} field {key!r}", remedy) for key, item in value.items()}
    if isinstance(value, torch.Size):
        return {SHAPE: list(value)}
    if isinstance(value, (list, tuple)):
        return [encoded(item, what, remedy) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor) and value.ndim == 0:
        return {NUMBER: [value.item(), str(value.dtype)]}
    if isinstance(value, torch.dtype):
        return {DTYPE: str(value)}
    raise ValueError(f"the {what} holds a {type(value).__name__}, which no checkpoint can keep; {remedy}")


def decoded(value: object) -> object:
    if isinstance(value, dict) and value.keys() == {PAIRS}:
        return {_key(key): decoded(item) for key, item in value[PAIRS]}
    if isinstance(value, dict) and value.keys() == {COUNTER}:
        return Counter(dict(value[COUNTER]))
    if isinstance(value, dict) and value.keys() == {NUMBER}:
        number, dtype = value[NUMBER]
        return torch.tensor(number, dtype=_dtype(dtype), device="cpu")
    if isinstance(value, dict) and value.keys() == {DTYPE}:
        return _dtype(value[DTYPE])
    if isinstance(value, dict) and value.keys() == {SHAPE}:
        return torch.Size(value[SHAPE])
    if isinstance(value, dict):
        return {key: decoded(item) for key, item in value.items()}
    return [decoded(item) for item in value] if isinstance(value, list) else value


def _key(value: object) -> object:
    """A key of a dictionary: a list in JSON was a tuple."""
    return tuple(map(_key, value)) if isinstance(value, list) else decoded(value)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name.removeprefix("torch."))
