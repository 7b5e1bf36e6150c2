"""What the package does not have, measured beside what it has (`bench.accuracy.forms`): rows of lora_A of another length, or
each of the length that its inputs ask for, gates drawn for every example, and ranks that grow in the place of a cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cobra import Adapter, CobraLinear
from cobra.singular import ROW_NORM
from cobra_kernels import concrete_gates, gated_lora_linear


@torch.no_grad()
def scale_rows(adapter: Adapter, times: float) -> None:
    """Makes every lora_A this many times as long; with lora_B at 0 the model's outputs stay."""
    for group in adapter.groups:
        for layer in group.all_layers:
            layer.lora_A.mul_(times)


@torch.no_grad()
def fit_rows(adapter: Adapter, batches: Sequence[dict[str, Tensor]]) -> None:
    """Gives every row a of lora_A the length at which it sees of these batches' tokens x what a drawn row does on average:
    E[(a·x)²] = ROW_NORM² E‖x‖² / K. Rows that see nothing stay, as the model's outputs do with lora_B at 0.
    """
    layers = [layer for group in adapter.groups for layer in group.all_layers]
    seen = {layer: torch.zeros(layer.rank, device=layer.lora_A.device) for layer in layers}
    drawn = dict.fromkeys(layers, 0.0)

    def watch(layer: CobraLinear, args: tuple[Tensor]) -> None:
        x = args[0][batch["attention_mask"].bool()]
        seen[layer] += (x @ layer.lora_A.t()).square().sum(0)
        drawn[layer] += ROW_NORM**2 * x.square().sum() / layer.in_features

    watches = [layer.register_forward_pre_hook(watch) for layer in layers]
    adapter.model.eval()
    for batch in batches:
        adapter.model(**batch)
    for layer, handle in zip(layers, watches, strict=True):
        handle.remove()
        layer.lora_A.mul_(torch.where(seen[layer] > 0, (drawn[layer] / seen[layer]).sqrt(), 1.0)[:, None])


def draw_per_example(adapter: Adapter, seed: int) -> None:
    """From now on gates that are sampled have noise of their own for every example, the first dimension of a layer's input."""
    generator = torch.Generator().manual_seed(seed)
    for group in adapter.groups:
        for layer in group.all_layers:
            layer.forward = _PerExample(layer, generator)


class _PerExample:
    """The forward of a CobraLinear whose gates are (examples, r)."""

    def __init__(self, layer: CobraLinear, generator: torch.Generator):
        self.layer, self.generator = layer, generator

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        if not layer.training or layer.gate_noise is None:
            return CobraLinear.forward(layer, x)
        u = torch.rand(len(x), layer.rank, generator=self.generator).clamp(2.0**-24, 1 - 2.0**-24).to(x.device)
        z = concrete_gates(layer.lora_gate.expand_as(u), u.logit(), layer.gate_temperature, stretch=layer.stretch)
        z = z.reshape(len(x), *[1] * (x.ndim - 2), -1).expand(*x.shape[:-1], -1)
        return gated_lora_linear(x, layer.linear_weight, layer.lora_A, layer.lora_B, z, scaling=layer.scaling, bias=layer.bias)


class Growth:
    """Ranks of an adapter with open gates that take part in training one after the other, up to a budget.

    Every layer starts with its first rank. In rounds, evenly over the first steps, each of which spends an equal share of what
    is left of the budget, the next rank of that layer opens which has the most to gain for its parameters: the squared gradient
    of its column of lora_B, which is 0 until then, summed over the steps since the last round. (After IncreLoRA, Zhang et al.
    2023, whose criterion is AdaLoRA's importance of whole layers.) A rank that opens late begins with a step of about three
    times the rate: Adam's moments are 0 there, and their correction is that of the whole matrix.

    amount: parameters of all ranks; rounds: the last one is at step `until`
    """

    def __init__(self, adapter: Adapter, amount: int, rounds: int, until: int):
        self.layers = {group.name: group.all_layers[0] for group in adapter.groups}
        self.cost = {name: layer.in_features + layer.out_features for name, layer in self.layers.items()}
        self.ranks = dict.fromkeys(self.layers, 1)
        self.wanted = {name: torch.zeros(layer.rank) for name, layer in self.layers.items()}
        self.amount, self.rounds, self.until, self.done = amount, rounds, until, 0
        if self.spent > amount:
            raise ValueError(f"a budget of {amount} parameters has no first rank for every layer, which takes {self.spent}")
        for name, layer in self.layers.items():
            layer.lora_B.register_hook(self._hook(name))

    @property
    def spent(self) -> int:
        return sum(rank * self.cost[name] for name, rank in self.ranks.items())

    def _hook(self, name: str):
        def closed_columns(gradient: Tensor) -> Tensor:
            self.wanted[name] += gradient.detach().float().square().sum(0).cpu()
            return gradient * (torch.arange(gradient.shape[1], device=gradient.device) < self.ranks[name])

        return closed_columns

    def after_step(self, step: int) -> None:
        """Opens what this step's round allows, if it is one."""
        while self.done < self.rounds and step * self.rounds >= (self.done + 1) * self.until:
            self.done += 1
            self._open(self.spent + (self.amount - self.spent) / (self.rounds - self.done + 1))
            self.wanted = {name: torch.zeros_like(gains) for name, gains in self.wanted.items()}

    def _open(self, limit: float) -> None:
        def gain(name: str) -> float:
            return self.wanted[name][self.ranks[name]].item() / self.cost[name]

        while fitting := [n for n in self.ranks if self.ranks[n] < self.layers[n].rank and self.spent + self.cost[n] <= limit]:
            self.ranks[max(fitting, key=gain)] += 1
