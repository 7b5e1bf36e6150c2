"""Parameters that several layers hold are in a model's state once, under the first name: writers refuse a tensor under two."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from cobra.linear import CobraLinear


def write_once(model: nn.Module) -> None:
    """From now on `model.state_dict()` leaves the other names out, and `load_state_dict` fills them in."""
    if _leave_out not in model._state_dict_hooks.values():
        model.register_state_dict_post_hook(_leave_out)
        model.register_load_state_dict_pre_hook(_fill_in)


def _leave_out(model: nn.Module, state: dict, prefix: str, local_metadata: dict) -> None:
    for _, other in _pairs(model, prefix):
        state.pop(other, None)


def _fill_in(model: nn.Module, state: dict, prefix: str, *others: object) -> None:
    for first, other in _pairs(model, prefix):
        if first in state:
            state.setdefault(other, state[first])


def _pairs(model: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
    """First and other names of what layers borrow within the model."""
    first: dict[int, str] = {}
    for path, layer in model.named_modules():
        for name in ("lora_A", "lora_B", "lora_gate") if isinstance(layer, CobraLinear) else ():
            parameter, key = getattr(layer, name), f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
            if parameter is not None and first.setdefault(id(parameter), key) != key:
                yield first[id(parameter)], key
