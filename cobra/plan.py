"""Which ranks are kept: the plan that records it, and plans made from scores alone."""

from __future__ import annotations

import csv
import dataclasses
import io
import reprlib
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cobra import storage
from cobra.budget import Allocation, Budget, allocate, is_whole
from cobra.config import CHOICES
from cobra.notebook import folded_table
from cobra.prior import fuse, prior_logits
from cobra.scores import LayerScores

KIND = "rank plan"


def rank_cost(unit: str, shapes: Iterable[tuple[int, int]], element_size: int = 4) -> int:
    """What one rank of a group costs in a budget's unit.

    shapes: (K, N) of every layer of the group
    element_size: bytes of one trained value

    out: ranks: 1; parameters: Σ (K + N); bytes: those times element_size; flops: 2 Σ (K + N), forward, per token, unmerged
    """
    parameters = sum(K + N for K, N in shapes)
    return {"ranks": 1, "parameters": parameters, "bytes": parameters * element_size, "flops": 2 * parameters}[unit]


@dataclass(frozen=True)
class SitePlan:
    """One group of gates: the layers that share it, what is kept, and with what certainty.

    members: layer names
    cost: trainable parameters of one rank, Σ (K + N) over the members
    kept: indices into the group's gates, or into its singular directions where the plan has energies
    posterior: probability of every gate, sigmoid of its logit; before any training that is its prior
    energy: (r,) of every singular direction of the group's updates, the largest first; empty where gates were ranked
    """

    name: str
    members: tuple[str, ...]
    cost: int
    kept: tuple[int, ...]
    posterior: tuple[float, ...]
    energy: tuple[float, ...] = ()

    @property
    def rank(self) -> int:
        return len(self.kept)

    @property
    def values(self) -> tuple[float, ...]:
        """By which ranks were kept: the energy, or else the posterior."""
        return self.energy or self.posterior


@dataclass(frozen=True)
class RankPlan:
    """The ranks of every group.

    fold: what a kept rank is multiplied with, CobraConfig's
    fingerprint: of the base model
    provenance: how the plan came about: its source ("gates", "singular" or "scores"), the budget, what of it was spent, and
        whether no allocation under that budget keeps more
    """

    sites: tuple[SitePlan, ...]
    fold: str
    fingerprint: str
    provenance: dict = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Layer -> rank, every layer of every group."""
        return {member: site.rank for site in self.sites for member in site.members}

    @property
    def total(self) -> int:
        """Ranks kept, one per group and gate."""
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
        """From `to_dict`. Raises ValueError for missing fields, values of a wrong type and kept ranks that are no gates."""
        try:
            _check_fields(value)
            sites = tuple(
                SitePlan(
                    name=s["name"],
                    members=tuple(s["members"]),
                    cost=s["cost"],
                    kept=tuple(s["kept"]),
                    posterior=tuple(s["posterior"]),
                    energy=tuple(s.get("energy", ())),  # older plans have none
                )
                for s in value["sites"]
            )
            plan = cls(sites, value["fold"], value["fingerprint"], dict(value.get("provenance", {})))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a complete rank plan: {error!r}") from error
        for s in plan.sites:
            if s.energy and len(s.energy) != len(s.posterior):
                raise ValueError(f"{s.name} has {len(s.energy)} energies for {len(s.posterior)} gates; expected one for each")
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

    def to_peft_config(self, scaling: float = 2.0, **settings):
        """A peft.LoraConfig of these ranks, to train them with peft and every trainer that takes its configs.

        scaling: alpha / r of every layer, whatever its rank; settings: further fields of LoraConfig
        """
        from cobra.export.config import peft_config

        return peft_config(self, scaling, **settings)

    def to_axolotl(self, scaling: float = 2.0) -> dict:
        """The adapter keys of an axolotl configuration, to be written as YAML."""
        from cobra.export.config import axolotl_keys

        return axolotl_keys(self, scaling)

    def rows(self) -> list[dict]:
        """One a layer: its group, rank, gates, the value of the weakest kept rank, parameters of one rank of the group."""
        return [
            {
                "layer": member,
                "group": site.name,
                "rank": site.rank,
                "gates": len(site.posterior),
                "least_kept": None if self.in_proportion else min((site.values[k] for k in site.kept), default=None),
                "rank_parameters": site.cost,
            }
            for site in self.sites
            for member in site.members
        ]

    @property
    def in_proportion(self) -> bool:
        """To scores: then all gates of a group have one probability, which decided nothing among them."""
        return self.provenance.get("source") == "scores"

    def to_dataframe(self):
        """`rows` as a data frame (needs pandas)."""
        import pandas

        return pandas.DataFrame(self.rows())

    def csv(self) -> str:
        """`rows` as text."""
        text = io.StringIO()
        fields = ("layer", "group", "rank", "gates", "least_kept", "rank_parameters")
        table = csv.DictWriter(text, fields, lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows())
        return text.getvalue()

    def plot(self, path: Path | str | None = None):
        """The ranks as a heat map, layer by module (needs matplotlib)."""
        from cobra.report.plots import rank_heatmap

        return rank_heatmap(self, path)

    def table(self) -> str:
        """One line a group: rank, value of the weakest kept and the strongest dropped one, parameters; then the budget."""
        width = max([len(s.name) for s in self.sites] + [5])
        lines = [f"{'site':<{width}}  rank  least kept  best dropped  parameters"]
        for s in self.sites:
            values = () if self.in_proportion else s.values
            kept = [value for k, value in enumerate(values) if k in set(s.kept)]
            dropped = [value for k, value in enumerate(values) if k not in set(s.kept)]
            spec = ".3g" if s.energy else ".3f"
            least = f"{min(kept):{spec}}" if kept else "-"
            best = f"{max(dropped):{spec}}" if dropped else "-"
            lines.append(f"{s.name:<{width}}  {s.rank:>4}  {least:>10}  {best:>12}  {s.rank * s.cost:>10,}")
        lines.append(f"{'total':<{width}}  {self.total:>4}  {'':>10}  {'':>12}  {self.parameters:>10,}")
        if self.provenance.get("allocation"):
            lines.append(self.provenance["allocation"])
        return "\n".join(lines)

    def __repr__(self) -> str:
        ranks = [s.rank for s in self.sites]
        return (
            f"RankPlan({self.total} ranks over {len(ranks)} groups, {min(ranks, default=0)} to {max(ranks, default=0)} each, "
            f"{self.parameters:,} parameters)"
        )

    def _repr_html_(self) -> str:
        return folded_table(self, self.table())


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_number(value: object) -> bool:
    """Whether a value is a number from 0 to the largest float; integers may be larger."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _each(holds: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(holds, value))


Check = tuple[Callable[[object], bool], str]  # what a value must be, and the same in words
_TEXT: Check = (_is_text, "a string")
_OBJECT: Check = (_is_object, "an object")
_BOOL: Check = (lambda value: isinstance(value, bool), "true or false")
_WHOLE: Check = (is_whole, "an integer >= 0")
_PLAN = {"sites": (_each(_is_object), "a list of objects"), "fingerprint": _TEXT, "provenance": _OBJECT}
_SITE = {
    "name": _TEXT,
    "members": (_each(_is_text), "a list of strings"),
    "cost": (lambda value: is_whole(value) and value > 0, "an integer >= 1"),
    "kept": (_each(is_whole), "a list of integers >= 0"),
    "posterior": (_each(lambda value: _is_number(value) and value <= 1), "a list of numbers from 0 to 1"),
    "energy": (_each(_is_number), "a list of finite numbers >= 0"),
}
_PROVENANCE = {"source": _TEXT, "budget": _OBJECT, "spent": _WHOLE, "optimal": _BOOL, "allocation": _TEXT, "step": _WHOLE}
_BUDGET = {"amount": _WHOLE, "unit": _TEXT}


def _check_fields(value: dict) -> None:
    """Raises ValueError naming the first field whose value is not what a plan holds there, KeyError without sites."""
    _expect("", value, _PLAN)
    for i, site in enumerate(value["sites"]):
        _expect(f"sites[{i}].", site, _SITE)
    made = value.get("provenance", {})
    _expect("provenance.", made, _PROVENANCE)
    _expect("provenance.budget.", made.get("budget", {}), _BUDGET)


def _expect(where: str, found: dict, checks: dict[str, Check]) -> None:
    for name, (holds, expected) in checks.items():
        if name in found and not holds(found[name]):
            raise ValueError(f"{where}{name}={reprlib.repr(found[name])}: expected {expected}")


def provenance(source: str, budget: Budget, allocation: Allocation) -> dict:
    """How a plan came about."""
    return {
        "source": source,
        "budget": budget.to_dict(),
        "spent": allocation.spent,
        "optimal": allocation.optimal,
        "allocation": str(allocation),
    }


def plan_ranks(scores: LayerScores, budget: int | Budget, r_max: int = 64, fusion: str = "product") -> RankPlan:
    """Ranks from a calibration alone, for training with any tool: shares of the budget in proportion to the prior.

    The k-th rank of a group counts pi / (k - 1/2), so that `allocate` hands out ranks by the method of Sainte-Laguë: in
    proportion to pi, rounded to whole ranks, exactly up to the budget.

    r_max: the largest rank of a group
    fusion: as in CobraConfig

    Warns where one group has more than half of the prior, as a pooler may that every output passes through, unless the budget
    has a maximum. Raises ValueError for budgets that `allocate` refuses.
    """
    budget = Budget.of(budget)
    pi = fuse(scores.conductance, scores.gradient, fusion).double()
    sizes = [min(r_max, *(min(shape) for shape in shapes)) for shapes in scores.shapes]
    shares = [p / (torch.arange(size, dtype=torch.float64) + 0.5) for p, size in zip(pi, sizes, strict=True)]
    costs = [rank_cost(budget.unit, shapes) for shapes in scores.shapes]
    allocation = allocate(list(scores.sites), shares, costs, budget)
    _warn_of_dominance(scores.sites, pi, allocation, budget, fusion)
    prior = prior_logits(pi, 5.0, "literal").sigmoid().tolist()
    return RankPlan(
        tuple(
            SitePlan(name, members, rank_cost("parameters", shapes), tuple(kept), (probability,) * size)
            for name, members, shapes, kept, probability, size in zip(
                scores.sites, scores.members, scores.shapes, allocation.kept, prior, sizes, strict=True
            )
        ),
        "one",
        scores.fingerprint,
        provenance("scores", budget, allocation),
    )


def _warn_of_dominance(names: tuple[str, ...], pi: Tensor, allocation: Allocation, budget: Budget, fusion: str) -> None:
    first = int(pi.argmax())
    if len(names) < 4 or pi[first] <= 0.5 or budget.maximum is not None:
        return
    ranks = list(map(len, allocation.kept))
    even = max(1, sum(ranks) // len(ranks))
    other = "take fusion='sum', which spreads more, " if fusion == "product" else ""
    warnings.warn(
        f"{names[first]} has {pi[first]:.0%} of the prior and gets {ranks[first]} of {sum(ranks)} ranks: limit it "
        f"with a maximum (Budget(..., maximum={{{names[first]!r}: {even}}})), {other}or calibrate without it (target_modules)",
        stacklevel=3,
    )
