"""Layers whose ranks are decided together, and what a rank of them costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from cobra.linear import CobraLinear
from cobra.plan import rank_cost
from cobra.sites import Site


@dataclass(eq=False)
class Group:
    """Layers that share one vector of gates.

    index: of the group in the Philox stream, fixed at attach
    sites: the base model's sites; layers: their CobraLinears, several where modules share one weight
    prior: logit of every gate's prior, exact in fp32
    """

    name: str
    index: int
    sites: list[Site]
    layers: list[list[CobraLinear]]
    prior: tuple[float, ...]

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(site.name for site in self.sites)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(K, N) of every site."""
        return [(site.in_features, site.out_features) for site in self.sites]

    @property
    def all_layers(self) -> list[CobraLinear]:
        return [layer for layers in self.layers for layer in layers]

    @property
    def gate(self) -> nn.Parameter | None:
        return self.layers[0][0].lora_gate

    @property
    def noise(self) -> Tensor | None:
        return self.layers[0][0].gate_noise

    @property
    def rank(self) -> int:
        return self.layers[0][0].rank


def cost_of_rank(sites: Sequence[Site], unit: str, element_size: int) -> int:
    """What one rank of a group costs; of FLOPs, once for every module that multiplies with a weight."""
    uses = [(s.in_features, s.out_features) for s in sites for _ in (s.modules if unit == "flops" else s.modules[:1])]
    return rank_cost(unit, uses, element_size)
