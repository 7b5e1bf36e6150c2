"""The rows behind each figure, as numbers."""

from __future__ import annotations

from collections.abc import Sequence

from cobra.merge import MergeReport
from cobra.plan import RankPlan
from cobra.prior import fuse
from cobra.report import measures
from cobra.report.markup import Table
from cobra.report.run import Bin, Gates
from cobra.scores import LayerScores


def ranks(plan: RankPlan) -> Table:
    """A row a layer, and its group where groups are more than one layer."""
    header = ["layer", "rank", "gates", "least kept", "best dropped", "parameters of a rank"]
    rows = []
    for site in plan.sites:
        kept, values = set(site.kept), () if plan.in_proportion else site.values
        least = min((value for k, value in enumerate(values) if k in kept), default=None)
        best = max((value for k, value in enumerate(values) if k not in kept), default=None)
        rows += [(member, site.rank, len(site.posterior), least, best, site.cost, site.name) for member in site.members]
    if all(row[0] == row[-1] for row in rows):
        return Table(tuple(header), [row[:-1] for row in rows])
    return Table((*header, "group"), rows)


def prior(scores: LayerScores, plan: RankPlan, fusion: str) -> Table:
    """A row a group; what training made of it where there was any."""
    pi, kept = fuse(scores.conductance, scores.gradient, fusion).tolist(), plan.total or 1
    rows = [(site.name, share, site.rank / kept, site.rank) for site, share in zip(plan.sites, pi, strict=True)]
    if not measures.was_trained(plan):
        return Table(("group", "prior share", "kept share", "rank"), rows)
    expected = [sum(site.posterior) for site in plan.sites]
    total = sum(expected) or 1.0
    rows = [(*row, rank / total, rank) for row, rank in zip(rows, expected, strict=True)]
    return Table(("group", "prior share", "kept share", "rank", "posterior share", "expected rank"), rows)


def mismatch(scores: LayerScores | None, plan: RankPlan, fusion: str) -> str:
    """Why scores and plan cannot be compared, or nothing."""
    if scores is None:
        return ""
    if scores.fingerprint != plan.fingerprint:
        return f"scores and plan are of different models (fingerprints {scores.fingerprint} and {plan.fingerprint})"
    if scores.sites != tuple(site.name for site in plan.sites):
        return f"the scores have {len(scores.sites)} groups, the plan {len(plan.sites)}, or others"
    try:
        fuse(scores.conductance, scores.gradient, fusion)
    except ValueError as error:
        return str(error)
    return ""


def posterior(plan: RankPlan) -> Table:
    gates = ((site, k) for site in plan.sites for k in range(len(site.posterior)))
    return Table(("group", "gate", "probability", "kept"), [(s.name, k, s.posterior[k], k in s.kept) for s, k in gates])


def factors(scores: LayerScores) -> Table:
    f = measures.factors(scores)
    zones = dict.fromkeys(f.red, "red zone") | dict.fromkeys(f.under, "contribution above gradient")
    columns = (scores.conductance.tolist(), scores.gradient.tolist(), f.contribution.tolist(), f.gradient.tolist())
    rows = [(*row, zones.get(i, "")) for i, row in enumerate(zip(scores.sites, *columns, strict=True))]
    return Table(("group", "contribution", "gradient", "contribution / even", "gradient / even", "zone"), rows)


def history(rows: list[dict], keys: tuple[str, ...] = ()) -> Table:
    """Every step; these columns, or all there are."""
    known = dict.fromkeys(key for row in rows for key in row if key != "step")
    chosen = [key for key in known if not keys or key in keys]
    return Table(("step", *chosen), [(row["step"], *(row.get(key) for key in chosen)) for row in rows])


def panels(rows: list[dict], labels: dict[str, str]) -> dict[str, tuple[list[int], list[float]]]:
    """label -> (steps, values) of the columns that were logged."""
    found = {}
    for key, label in labels.items():
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            found[label] = tuple(map(list, zip(*points, strict=True)))
    return found


def uneven(gates: dict[int, Gates]) -> str:
    """Why trajectories cannot be drawn, or nothing."""
    sizes = {step: {name: len(p) for name, p in row.items()} for step, row in gates.items()}
    first = next(iter(sizes))
    other = next((step for step, size in sizes.items() if size != sizes[first]), None)
    if other is not None:
        return f"the gates at steps {first} and {other} are of different groups or numbers"
    return "" if any(sizes[first].values()) else "no gates were recorded"


def same_gates(gates: dict[int, Gates], plan: RankPlan) -> bool:
    return {name: len(p) for name, p in next(iter(gates.values())).items()} == {s.name: len(s.posterior) for s in plan.sites}


def trajectories(gates: dict[int, Gates]) -> Table:
    rows = [(name, k, step, p) for step, row in gates.items() for name, values in row.items() for k, p in enumerate(values)]
    return Table(("group", "gate", "step", "probability"), rows)


def bins(found: Sequence[Bin]) -> Table:
    rows = [(b.confidence, b.accuracy, *measures.wilson(b.accuracy, b.count), b.count) for b in found]
    return Table(("confidence", "accuracy", "95 % from", "95 % to", "examples"), rows)


def merge(report: MergeReport) -> Table:
    rows = []
    for s in report.sites:
        share = s.delta_norm / s.weight_norm if s.weight_norm else None
        rows.append((s.name, s.rank, s.delta_norm, s.weight_norm, share, s.rounding_loss, s.merged))
    return Table(("layer", "rank", "‖update‖", "‖weight‖", "‖update‖ / ‖weight‖", "lost to rounding", "merged"), rows)


def completeness(scores: LayerScores) -> Table:
    c = scores.completeness
    rows = [("residual along the path", c.path), ("residual over layers", c.sites), ("mean change of F", c.change)]
    return Table(("what", "value"), [*rows, *scores.settings.items()])
