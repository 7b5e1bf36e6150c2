"""How adapters are deployed, layer by layer; no tensor takes part in a decision.

    base     no adapter has rank here: the plain layer
    merged   one adapter that stays: W' = round(W + B A), nothing is added to a step, part of the update is lost to rounding
    packed   adapters at their own ranks, a product each
    padded   adapters at their largest rank, in one batched product

A lone, long-lived adapter is merged where the predicted rounding loss is within tolerance; otherwise what takes less time
is taken, and of equals what stores less. `cobra.deploy.cost` has the equations.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cobra.deploy.cost import (
    WORKSPACE,
    Cost,
    MergeSchedule,
    SiteShape,
    Workload,
    merge_schedule,
    merge_seconds,
    require_int,
    unmerged_cost,
)
from cobra.deploy.device import ITEMSIZE, DeviceSpec, checked_fields, device_spec, is_number, nearest, one_of

CHOICES = ("base", "merged", "packed", "padded")


@dataclass(frozen=True)
class SiteDeployment:
    """What is done at one site and what it costs beside the bare layer.

    stored: bytes beside the weight; moved: bytes to and from memory a step; added_us: microseconds added to a step
    rounding_loss: of a merge, predicted; None where not known or with several adapters
    merge_us: of the merge itself, once
    """

    site: SiteShape
    choice: str
    reason: str
    stored: int
    moved: int
    added_us: float
    merge_us: float
    rounding_loss: float | None

    def __post_init__(self):
        one_of(f"{self.site.name}: choice", self.choice, CHOICES)

    @classmethod
    def from_dict(cls, value: dict) -> SiteDeployment:
        fields = checked_fields(cls, value)
        return cls(**{**fields, "site": SiteShape(**checked_fields(SiteShape, fields["site"]))})


@dataclass(frozen=True, repr=False)
class DeploymentPlan:
    """A choice for every site, and the merges in launches. `print(plan)` shows why."""

    device: DeviceSpec
    workload: Workload
    tolerance: float
    workspace: int
    sites: tuple[SiteDeployment, ...]
    merges: MergeSchedule

    @property
    def choices(self) -> dict[str, str]:
        return {s.site.name: s.choice for s in self.sites}

    @property
    def stored(self) -> int:
        return sum(s.stored for s in self.sites)

    @property
    def moved(self) -> int:
        return sum(s.moved for s in self.sites)

    @property
    def added_us(self) -> float:
        return sum(s.added_us for s in self.sites)

    @property
    def merge_us(self) -> float:
        return sum(s.merge_us for s in self.sites)

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: dict) -> DeploymentPlan:
        """From `to_dict`. Raises ValueError for missing and unknown fields, with the nearest, and values that cannot be."""
        fields = checked_fields(cls, value)
        try:
            return cls(
                DeviceSpec.from_dict(fields["device"]),
                Workload(**checked_fields(Workload, fields["workload"])),
                fields["tolerance"],
                fields["workspace"],
                tuple(map(SiteDeployment.from_dict, fields["sites"])),
                MergeSchedule.from_dict(fields["merges"]),
            )
        except TypeError as error:
            raise ValueError(f"not a complete deployment plan: {error}") from error

    def table(self, all: bool = False) -> str:
        """Device, workload, one line a site with what decided, totals.

        Sites of one shape, rank and choice whose names differ in numbers only share a line, unless `all`: their sums, and the
        largest rounding loss with its reason.
        """
        lines: dict[object, list[SiteDeployment]] = {}
        for s in self.sites:
            alike = (re.sub(r"\d+", "*", s.site.name), dataclasses.replace(s.site, name="*", weight_std=None, delta_std=None))
            lines.setdefault(s.site.name if all else (*alike, s.choice), []).append(s)
        rows = [
            ("site", "sites", "shape", "dtype", "ranks", "choice", "stored B", "moved B", "added µs", "merge µs", "lost", "why")
        ]
        rows += [_row(alike) for alike in lines.values()]
        total = (f"{self.stored:,}", f"{self.moved:,}", f"{self.added_us:,.1f}", f"{self.merge_us:,.1f}", "", "")
        rows.append(("total", f"{len(self.sites)}", "", "", "", "", *total))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        left = {0, 2, 3, 5, 11}
        body = [
            "  ".join(
                f"{cell:<{w}}" if i in left else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([*self._header(), "", *map(str.rstrip, body)])

    def _header(self) -> list[str]:
        d, w = self.device, self.workload
        flops = ", ".join(
            f"{d.flops(t) / 1e12:.3g} TFLOP/s {t}" for t in ITEMSIZE if any(s.site.dtype == t for s in self.sites)
        )
        in_flight = "all adapters" if w.adapters is None else f"{w.adapters} adapters"
        lasts = "long-lived" if w.long_lived else "not long-lived"
        return [
            f"device    {d.name}: {flops}{', ' * bool(flops)}{d.bandwidth / 1e9:,.4g} GB/s, {d.launch * 1e6:.2g} µs a launch",
            f"workload  {w.tokens:,} tokens a step, {in_flight} in flight, {lasts}",
            f"merges    at most {self.tolerance:g} of an update lost to rounding; {len(self.merges.chunks)} chunks in "
            f"{self.workspace:,} bytes of workspace",
        ]

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        counts = {c: sum(s.choice == c for s in self.sites) for c in CHOICES}
        chosen = ", ".join(f"{n} {c}" for c, n in counts.items() if n) or "no sites"
        return f"DeploymentPlan({self.device.name}: {chosen}; {self.stored:,} bytes, {self.added_us:,.1f} µs a step)"


def plan_deployment(
    sites: Sequence[SiteShape],
    device: DeviceSpec | str,
    workload: Workload,
    *,
    tolerance: float = 0.1,
    workspace: int = WORKSPACE,
    fixed: Mapping[str, str] | None = None,
) -> DeploymentPlan:
    """Decides every site.

    device: a spec, or the name of a committed one
    tolerance: largest predicted rounding loss that is merged
    workspace: bytes for the sums of one launch of merges
    fixed: site -> choice, made by the caller

    Raises ValueError for sites of one name or of different numbers of adapters, fixed choices that cannot be, and a workspace
    smaller than a row.
    """
    device = device_spec(device) if isinstance(device, str) else device
    fixed = dict(fixed or {})
    _check(sites, workload, fixed)
    if not is_number(tolerance):
        raise ValueError(f"tolerance={tolerance!r}: expected a finite number of at least 0")
    require_int("workspace", workspace, 1)
    decided = tuple(_decide(s, device, workload, tolerance, workspace, fixed.get(s.name)) for s in sites)
    merges = merge_schedule([s.site for s in decided if s.choice == "merged"], workspace)
    return DeploymentPlan(device, workload, tolerance, workspace, decided, merges)


def _decide(
    site: SiteShape, device: DeviceSpec, workload: Workload, tolerance: float, workspace: int, forced: str | None
) -> SiteDeployment:
    if forced is not None:
        _check_forced(site, forced)
    if not any(site.ranks):
        return SiteDeployment(site, "base", "rank 0 in every adapter", 0, 0, 0.0, 0.0, None)
    costs = {choice: unmerged_cost(site, device, workload, choice) for choice in ("packed", "padded")}
    choice = min(costs, key=lambda c: (costs[c].seconds, costs[c].stored))
    merge = merge_seconds(site, device, workspace)
    saved, loss = costs[choice].seconds, site.rounding_loss
    if len(site.ranks) > 1:
        waste = len(site.ranks) * max(site.ranks) / sum(site.ranks)
        reason = ", ".join(f"{c} {costs[c].seconds * 1e6:,.1f} µs" for c in costs) + f"; padding stores {waste:.3g}x the ranks"
    elif not workload.long_lived:
        reason = f"a merge of {merge * 1e6:,.1f} µs would pay after {math.ceil(merge / saved):,} steps"
    elif loss is None:
        reason = "a merge needs weight_std and delta_std, to predict what rounding loses"
    elif loss > tolerance:
        reason = f"a merge would lose {loss:.2g} of the update, more than {tolerance:g}"
    else:
        choice, reason = "merged", f"rounding loses {loss:.2g} of the update; {saved * 1e6:,.1f} µs a step saved"
    if forced is not None:
        against = "" if choice == forced else f", against {choice}"
        choice, reason = forced, f"fixed by the caller{against}; {reason}"
    cost = costs.get(choice, Cost())
    merge_us = merge * 1e6 if choice == "merged" else 0.0
    return SiteDeployment(site, choice, reason, cost.stored, cost.moved, cost.seconds * 1e6, merge_us, loss)


def _check(sites: Sequence[SiteShape], workload: Workload, fixed: Mapping[str, str]) -> None:
    names = Counter(site.name for site in sites)
    for site in sites:
        if names[site.name] > 1:
            raise ValueError(f"{site.name} is the name of {names[site.name]} sites; expected one each")
        if len(site.ranks) != len(sites[0].ranks):
            raise ValueError(
                f"{site.name} has ranks of {len(site.ranks)} adapters, {sites[0].name} of {len(sites[0].ranks)}; "
                "give rank 0 where an adapter leaves a layer alone"
            )
    if sites and workload.adapters is not None and workload.adapters > len(sites[0].ranks):
        raise ValueError(f"adapters={workload.adapters} in flight; the sites have ranks of {len(sites[0].ranks)}")
    for name in fixed:
        if name not in names:
            raise ValueError(f"fixed names {name!r}, which is no site{nearest(name, names)}")


def _check_forced(site: SiteShape, choice: str) -> None:
    one_of(f"{site.name}: fixed choice", choice, CHOICES)
    if not any(site.ranks) and choice != "base":
        raise ValueError(f"{site.name} cannot be {choice}: no adapter has rank here; leave it out of fixed, it stays base")
    if any(site.ranks) and choice == "base":
        raise ValueError(
            f"{site.name} cannot be base: that drops updates of rank {max(site.ranks)}; give it rank 0 to drop them"
        )
    if choice == "merged" and len(site.ranks) > 1:
        raise ValueError(
            f"{site.name} cannot be merged: a weight holds one adapter, there are {len(site.ranks)}; use packed or padded"
        )


def _row(alike: list[SiteDeployment]) -> tuple[str, ...]:
    s = max(alike, key=lambda s: s.rounding_loss or 0.0)
    name = s.site.name if len(alike) == 1 else re.sub(r"\d+", "*", s.site.name)
    ranks = s.site.ranks
    low, high = min(ranks), max(ranks)
    return (
        name,
        f"{len(alike)}",
        f"{s.site.in_features} → {s.site.out_features}",
        s.site.dtype,
        (f"{len(ranks)} × " if len(ranks) > 1 else "") + (f"{low}" if low == high else f"{low}..{high}"),
        s.choice,
        f"{sum(a.stored for a in alike):,}",
        f"{sum(a.moved for a in alike):,}",
        f"{sum(a.added_us for a in alike):,.1f}",
        f"{sum(a.merge_us for a in alike):,.1f}",
        "-" if s.rounding_loss is None else f"{s.rounding_loss:.2g}",
        s.reason,
    )
