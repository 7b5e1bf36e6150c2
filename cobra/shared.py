"""Layers that get the same input one after the other, as q, k and v do: the first computes the outputs of all.

Which layers those are is seen in the first training step, and changes between steps alone, where no graph is under way: a
forward and its recomputation by activation checkpointing take the same path. Sums of several layers have other last bits than
those of each alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cobra_kernels import gated_lora_linears

if TYPE_CHECKING:
    from cobra.linear import CobraLinear

PLAIN = (Tensor, nn.Parameter)


@dataclass(eq=False)
class _Computed:
    """Outputs of one input that their layers have not asked for yet, with the versions of the tensors behind each."""

    x: Tensor
    x_version: int
    setting: tuple
    outputs: dict[int, tuple[Tensor, list[int]]]


class SharedInputs:
    """Of the layers of one adapter. A copy has seen nothing yet."""

    def __init__(self):
        self.groups: dict[int, tuple[CobraLinear, ...]] = {}  # id of a layer -> the layers that share its input
        self.settled = False
        self._seen: dict[tuple[int, ...], tuple[CobraLinear, ...]] = {}  # ids -> layers called in a row with one input
        self._row: list[CobraLinear] = []
        self._x, self._x_version = None, 0
        self._computed: _Computed | None = None
        self._missed: set[int] = set()

    def __reduce__(self) -> tuple:
        return SharedInputs, ()

    def output(self, layer: CobraLinear, x: Tensor) -> Tensor | None:
        """y of the layer, or None where it has to be computed alone."""
        if x.is_inference():  # has no version
            return None
        if not self.settled:
            self._see(layer, x)
            return None
        group = self.groups.get(id(layer))
        if group is None:
            return None
        found, setting = self._computed, _setting(layer)
        if found is not None and found.x is x and found.x_version == x._version and found.setting == setting:
            y, versions = found.outputs.get(id(layer), (None, None))
            if versions == _versions(layer):
                del found.outputs[id(layer)]
                self._computed = found if found.outputs else None
                return y
        return self._compute(group, layer, x, setting)

    def settle(self) -> None:
        """Between steps: what was seen to share its input shares it from now on, and no longer once it did not."""
        self._close()
        if not self.settled:
            self.groups, self.settled = _groups(self._seen.values()), bool(self._seen)
        elif self._missed:
            self.groups = {i: group for i, group in self.groups.items() if not self._missed & set(map(id, group))}
        self._seen, self._computed, self._missed = {}, None, set()

    def forget(self) -> None:
        """After layers went or were cut: all is to be seen again."""
        self.__init__()

    def _see(self, layer: CobraLinear, x: Tensor) -> None:
        if not layer.training or getattr(layer, "_is_replica", False):  # DataParallel's copies live for one forward
            return
        if x is not self._x or x._version != self._x_version:
            self._close()
            self._x, self._x_version = x, x._version
        self._row.append(layer)

    def _close(self) -> None:
        if self._row:
            self._seen[tuple(map(id, self._row))] = tuple(self._row)
        self._row, self._x = [], None

    def _compute(self, group: tuple[CobraLinear, ...], layer: CobraLinear, x: Tensor, setting: tuple) -> Tensor | None:
        left, self._computed = self._computed, None
        if left is not None:
            self._missed |= left.outputs.keys()
        if layer is not group[0] or not all(_joins(each, layer, x) for each in group):
            return None
        first, *others = gated_lora_linears(x, [each.operands() for each in group])
        rest = {id(each): (y, _versions(each)) for each, y in zip(group[1:], others, strict=True)}
        self._computed = _Computed(x, x._version, setting, rest)
        return first


def _groups(rows) -> dict[int, tuple[CobraLinear, ...]]:
    """Rows of different layers that were called in that row alone."""
    calls: dict[int, int] = {}
    for row in rows:
        for layer in row:
            calls[id(layer)] = calls.get(id(layer), 0) + 1
    return {id(layer): row for row in rows if len(row) > 1 and all(calls[id(each)] == 1 for each in row) for layer in row}


def _versions(layer: CobraLinear) -> list[int]:
    """Of parameters, and of the step's noise and temperature."""
    return [t._version for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))]


def _setting(layer: CobraLinear) -> tuple:
    """What a forward depends on beside its input and parameters."""
    device = layer.weight.device.type
    cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return torch.is_grad_enabled(), cast, layer.training


def _joins(layer: CobraLinear, first: CobraLinear, x: Tensor) -> bool:
    """Whether the layer computes as the first does, with parameters that are whole and beside the input."""
    tensors = (x, *layer.parameters(recurse=False))
    return (
        layer.training == first.training
        and layer.joins_others()
        and all(type(t) in PLAIN and t.device == x.device for t in tensors)
        and layer.weight.numel() == layer.in_features * layer.out_features
        and layer.lora_A.shape[1] == x.shape[-1]
    )
