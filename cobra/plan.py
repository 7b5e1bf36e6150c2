"""Which ranks are kept: the exact cut, and the plan that records it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cobra import storage
from cobra.config import CHOICES

KIND = "rank plan"


def top_ranks(scores: list[Tensor], budget: int) -> list[list[int]]:
    """The `budget` best gates over all groups, exactly, also with ties.

    Equal gates are taken one index at a time round the groups, so that equal scores give even ranks.

    scores: per group, (r,)

    out: per group, the kept indices in ascending order

    Raises ValueError for a budget below 0 or above the number of gates, and scores that are not finite.
    """
    capacity = sum(len(s) for s in scores)
    if not 0 <= budget <= capacity:
        raise ValueError(
            f"budget={budget}: expected 0 to {capacity}, the capacity of {len(scores)} groups; raise r_max for more"
        )
    if not scores:
        return []
    flat = torch.cat([s.detach().double().cpu() for s in scores])
    if not torch.isfinite(flat).all():
        raise ValueError(
            f"{int((~torch.isfinite(flat)).sum())} gate scores are not finite: the training diverged; lower the learning rate"
        )
    group = torch.cat([torch.full((len(s),), g) for g, s in enumerate(scores)])
    index = torch.cat([torch.arange(len(s)) for s in scores])
    by_round = torch.argsort(index, stable=True)
    order = by_round[torch.argsort(flat[by_round], descending=True, stable=True)][:budget]
    kept: list[list[int]] = [[] for _ in scores]
    for g, k in zip(group[order].tolist(), index[order].tolist(), strict=True):
        kept[g].append(k)
    return [sorted(ks) for ks in kept]


@dataclass(frozen=True)
class SitePlan:
    """One group of gates: the layers that share it, what is kept, and with what certainty.

    members: layer names
    cost: trainable parameters of one rank, Σ (K + N) over the members
    kept: indices into the group's gates
    posterior: sigmoid of every gate's logit
    """

    name: str
    members: tuple[str, ...]
    cost: int
    kept: tuple[int, ...]
    posterior: tuple[float, ...]

    @property
    def rank(self) -> int:
        return len(self.kept)


@dataclass(frozen=True)
class RankPlan:
    """The ranks of every group. `fingerprint` is the base model's; `fold` is what a kept rank is multiplied with."""

    sites: tuple[SitePlan, ...]
    fold: str
    fingerprint: str

    @property
    def ranks(self) -> dict[str, int]:
        """Layer -> rank, every layer of every group."""
        return {member: site.rank for site in self.sites for member in site.members}

    @property
    def total(self) -> int:
        """Ranks kept, one per group and gate: the budget's unit."""
        return sum(site.rank for site in self.sites)

    @property
    def parameters(self) -> int:
        """Trainable parameters of the matrices that remain."""
        return sum(site.rank * site.cost for site in self.sites)

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: dict) -> RankPlan:
        """From `to_dict`. Raises ValueError for missing fields and kept ranks that are no gates."""
        try:
            sites = tuple(
                SitePlan(s["name"], tuple(s["members"]), s["cost"], tuple(s["kept"]), tuple(s["posterior"]))
                for s in value["sites"]
            )
            plan = cls(sites, value["fold"], value["fingerprint"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a complete rank plan: {error!r}") from error
        for s in plan.sites:
            if [k for k in range(len(s.posterior)) if k in s.kept] != list(s.kept):
                raise ValueError(f"{s.name} keeps ranks {s.kept} of {len(s.posterior)} gates; expected ascending indices")
        if plan.fold not in CHOICES["fold"]:
            raise ValueError(f"fold={plan.fold!r} is not one of {', '.join(map(repr, CHOICES['fold']))}")
        return plan

    def save(self, path: Path | str) -> None:
        """Writes one JSON file, whole or not at all."""
        storage.write_json(path, {"kind": KIND, "version": 1, **self.to_dict()})

    @classmethod
    def load(cls, path: Path | str) -> RankPlan:
        """Reads what `save` wrote. Raises FileNotFoundError, and FormatError for truncated or foreign files."""
        value = storage.read_json(path, KIND)
        try:
            return cls.from_dict(value)
        except ValueError as error:
            raise storage.FormatError(f"{path}: {error}") from error

    def table(self) -> str:
        """One line a group: rank, certainty of the weakest kept and the strongest dropped gate, parameters."""
        width = max([len(s.name) for s in self.sites] + [5])
        lines = [f"{'site':<{width}}  rank  least kept  best dropped  parameters"]
        for s in self.sites:
            kept = [s.posterior[k] for k in s.kept]
            dropped = [p for k, p in enumerate(s.posterior) if k not in set(s.kept)]
            least = f"{min(kept):.3f}" if kept else "-"
            best = f"{max(dropped):.3f}" if dropped else "-"
            lines.append(f"{s.name:<{width}}  {s.rank:>4}  {least:>10}  {best:>12}  {s.rank * s.cost:>10,}")
        lines.append(f"{'total':<{width}}  {self.total:>4}  {'':>10}  {'':>12}  {self.parameters:>10,}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        ranks = [s.rank for s in self.sites]
        return (
            f"RankPlan({self.total} ranks over {len(ranks)} groups, {min(ranks, default=0)} to {max(ranks, default=0)} each, "
            f"{self.parameters:,} parameters)"
        )
